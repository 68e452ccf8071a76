"""The order of the modules of dsrecipes/data/ in its docstring: complete, and no module imports from a later one."""

import ast
import re
from pathlib import Path

from dsrecipes import data

FOLDER = Path(data.__file__).parent
LINES = str(data.__doc__).splitlines()[2:]
ORDER = [name for line in LINES for name in re.findall(r"[a-z_]+", line.partition("   ")[2])]


def test_the_docstring_lists_every_module_once() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def test_no_module_imports_from_a_later_one() -> None:
    position = {name: index for index, name in enumerate(ORDER)}
    for name in ORDER:
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dsrecipes.data."):
                imported = str(node.module).split(".")[2]
                assert position[imported] < position[name], f"{name} imports from {imported}"
