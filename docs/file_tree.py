"""Write the file trees of the README and of docs/*/internals.md from the first line of each file.

    python docs/file_tree.py

The README lists packages and the files to read first; internals.md lists every file. What a file is about is the first
line of its docstring or comment, so a description is changed where the file is, and then this script is run again.
tests/test_docs.py fails where a tree is out of date.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- tree -->", "<!-- /tree -->"
_SHORT = ("README.md", "docs/README.zh-TW.md")
_FULL = ("docs/en/internals.md", "docs/zh-TW/internals.md")
_READ_FIRST = (
    "dsrecipes/cli.py",
    "dsrecipes/run.py",
    "dsrecipes/explain.py",
    "dsrecipes/completion.py",
    "dsrecipes/base.py",
    "dsrecipes/recipe_class.py",
    "dsrecipes/errors.py",
    "dsrecipes/train/training.py",
)
"""Files that the README lists beside the packages."""
_GROUPED = (
    ".ci", ".github", "benchmarks", "docs", "ds_configs", "dsrecipes/messages", "dsrecipes/reporting/page",
    "dsrecipes/starter", "dsrecipes/zero/keys",
)  # fmt: skip
"""Directories with one line for all that is in them."""
_ABOUT = {
    ".ci": "what continuous integration runs",
    ".github": "workflows and the issue template",
    ".gitignore": "what is not tracked",
    ".pre-commit-config.yaml": "checks before each commit",
    "CHANGELOG.md": "what changed in each release",
    "CONTRIBUTING.md": "how to set up, test and write here",
    "LICENSE": "Apache-2.0",
    "Makefile": "the commands for a new machine",
    "README.md": "this overview",
    "SECURITY.md": "how to report a vulnerability",
    "benchmarks": "speed next to plain loops, TRL and LLaMA-Factory",
    "constraints.txt": "the tested versions",
    "docs": "these pages in English and Traditional Chinese",
    "ds_configs": "a JSON file for each ZeRO stage",
    "dsrecipes": "the library",
    "dsrecipes/messages": "cause and cure of each message, one file per layer",
    "dsrecipes/reporting/page": "template, style, script and words of the report",
    "dsrecipes/starter": "small models and data for the starter profile",
    "dsrecipes/zero/keys": "the keys that each DeepSpeed version reads",
    "pyproject.toml": "build system and ruff",
    "recipes": "a pair per recipe: what a row means, and the numbers",
    "setup.cfg": "the package, its requirements, and the settings of pytest, mypy and import-linter",
    "tests": "tests, in the same directories as the files that they test",
}
"""Descriptions of what has no docstring or comment of its own."""


def tracked_files() -> list[str]:
    """Paths of all files of the repository, also of those that are new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({path for path in listed if (ROOT / path).exists()})


def describe(path: str) -> str:
    """What a file or directory is about; an empty string where it does not say."""
    if path in _ABOUT:
        return _ABOUT[path]
    file = ROOT / path
    if file.is_dir():
        package = file / "__init__.py"
        return describe(f"{path}/__init__.py") if package.exists() else ""
    if file.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        return docstring.partition("\n")[0].rstrip(".")
    if file.suffix in (".yaml", ".yml"):
        return _of_yaml(file)
    return ""


def _of_yaml(file: Path) -> str:
    """The `about` line of a recipe, else the first comment."""
    text = file.read_text(encoding="utf-8")
    about = re.search(r"^about: *(.+)$", text, re.MULTILINE)
    comment = re.match(r"# *(.+)", text)
    line = about or comment
    return line[1].strip().strip("\"'") if line else ""


def entries(files: list[str]) -> list[str]:
    """Every directory and file to list, each directory before what is in it."""
    listed: set[str] = set()
    for path in files:
        group = next((group for group in _GROUPED if path.startswith(f"{group}/")), None)
        if path.startswith("tests/") and not path.startswith("tests/support/"):
            group = "/".join(path.split("/")[:2]) if path.count("/") > 1 else None
        shown = Path(group or path)
        listed |= {str(shown), *(str(parent) for parent in shown.parents if str(parent) != ".")}
    # files of a directory come before its subdirectories
    return sorted(
        listed, key=lambda path: [(part != Path(path).name or (ROOT / path).is_dir(), part) for part in path.split("/")]
    )


def full_tree(files: list[str]) -> str:
    """Every file, one a line."""
    return _render([path for path in entries(files) if not path.endswith("__init__.py")])


def short_tree(files: list[str]) -> str:
    """Top-level files, packages, and the files to read first."""
    packages = {str(Path(path).parent) for path in files if re.fullmatch(r"dsrecipes/\w+/__init__\.py", path)}
    shown = [path for path in entries(files) if "/" not in path or path in _READ_FIRST or path in packages]
    return _render(shown)


def _render(paths: list[str]) -> str:
    lines = []
    for path in paths:
        name = Path(path).name + ("/" if (ROOT / path).is_dir() else "")
        lines.append(f"{'  ' * path.count('/') + name:<30}  {describe(path)}".rstrip())
    return "\n".join(lines)


def updated(page: str, tree: str) -> str:
    """The text of a page with the tree between its markers."""
    text = (ROOT / page).read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n```text\n{tree}\n```\n{END}{after}"


def pages() -> dict[str, str]:
    """What each page with a tree must contain."""
    files = tracked_files()
    short, full = short_tree(files), full_tree(files)
    return {page: updated(page, short) for page in _SHORT} | {page: updated(page, full) for page in _FULL}


def main() -> None:
    """Rewrite the trees."""
    for page, text in pages().items():
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
