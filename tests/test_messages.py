"""Every message that asks for action has an id, and every id an explanation in both languages."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import dsrecipes
from dsrecipes import cli, explain, messages
from dsrecipes.messages import RANGES, load_all, load_layer

from support.tiny import ROOT, refusal  # isort: skip

WITHOUT_ID = 0
"""Calls of UserError that still lack an id. The number may only fall."""
PACKAGE = Path(dsrecipes.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
ROOT_MODULES = {
    "cli": "cli",
    "explain": "cli",
    "completion": "cli",
    "run": "run",
    "base": "run",
    "recipe_class": "run",
    "errors": None,
}
"""Modules at the package's root -> the layer whose ids they use."""


def layer(path: Path) -> str | None:
    """The layer whose ids a module uses."""
    folder = path.parent.name
    return ROOT_MODULES.get(path.stem) if path.parent == PACKAGE else folder


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def calls_with_code(tree: ast.AST) -> list[ast.Call]:
    """Calls of UserError, of its subclasses' super().__init__, and of coded."""
    subclasses = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "UserError" in [name_of(base) for base in node.bases]
    ]
    own_init = [
        call
        for node in subclasses
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__"
    ]
    names = {"UserError", "coded"}
    return own_init + [node for node in ast.walk(tree) if isinstance(node, ast.Call) and name_of(node.func) in names]


def codes_in(tree: ast.AST, call: ast.Call) -> list[str]:
    """The ids that the function around a call spells out."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and call in ast.walk(node)]
    texts = [node.value for function in functions for node in ast.walk(function) if isinstance(node, ast.Constant)]
    return [text for text in texts if isinstance(text, str) and re.fullmatch(r"DSR\d{3}", text)]


def scan() -> tuple[dict[str, set[str | None]], list[str], list[str]]:
    """Layers by the ids they use; places without an id; places whose id is not written there."""
    used, missing, computed = defaultdict(set), [], []
    for path in SOURCES:
        if path.name == "errors.py":
            continue
        tree = ast.parse(path.read_text("utf-8"))
        for call in calls_with_code(tree):
            place = f"{path.relative_to(ROOT)}:{call.lineno}"
            first = call.args[0] if call.args else None
            if len(call.args) < 2:
                missing.append(place)
            elif isinstance(first, ast.Constant) and isinstance(first.value, str):
                used[first.value].add(layer(path))
            elif isinstance(first, ast.Name):  # assigned in the same function, which must spell the ids out
                codes = codes_in(tree, call)
                for code in codes:
                    used[code].add(layer(path))
                if not codes:
                    computed.append(place)
            elif not (isinstance(first, ast.Attribute) and first.attr == "code"):
                computed.append(place)
    return used, missing, computed


def is_owned(code: str, users: set[str | None]) -> bool:
    """Whether an id is used in the layer of its range, and otherwise only above it, for the same kind of fault."""
    owner = messages.layer_of(int(code[3:]))
    above = list(RANGES)[list(RANGES).index(owner) :] if owner else []
    return owner in users and users <= set(above)


def test_every_id_is_explained_and_used_in_its_layer():
    used, missing, computed = scan()
    catalogue = load_all()
    assert not computed, "write the id as text, or take it from another error's .code"
    assert sorted(used.keys() - catalogue.keys()) == [], "without an explanation in dsrecipes/messages/"
    assert sorted(catalogue.keys() - used.keys()) == [], "explained, but no message has the id"
    misplaced = {code: layers for code, layers in used.items() if not is_owned(code, layers)}
    assert misplaced == {}, "used below the layer whose range the id is in, or not used in that layer"
    assert len(missing) <= WITHOUT_ID, "a new message needs an id"


def test_the_scan_sees_each_kind_of_call(tmp_path, monkeypatch):
    module = tmp_path / "data" / "made_up.py"
    module.parent.mkdir()
    module.write_text(
        "class Odd(errors.UserError):\n"
        "    def __init__(self): super().__init__('DSR101', 'a')\n"
        "raise UserError('no id')\n"
        "raise errors.UserError('DSR102', 'b')\n"
        "coded('DSR103', 'c')\n"
        "UserError(error.code, 'd')\n"
        "UserError(code, 'e')\n"
        "def f():\n"
        "    code = 'DSR104'\n"
        "    return UserError(code, 'f')\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", [module])
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert scan() == (
        {"DSR101": {"data"}, "DSR102": {"data"}, "DSR103": {"data"}, "DSR104": {"data"}},
        ["data/made_up.py:3"],
        ["data/made_up.py:7"],
    )


def test_ranges_do_not_overlap_and_every_file_has_one():
    numbers = [number for first, last in RANGES.values() for number in range(first, last + 1)]
    assert len(numbers) == len(set(numbers))
    assert {path.stem for path in Path(messages.__file__).parent.glob("*.yaml")} <= RANGES.keys()


ENTRY = "DSR641:\n  title: a\n  cause: b\n  cure: c\n  zh: {title: 甲, cause: 乙, cure: 丙}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (ENTRY + ENTRY, "DSR641 appears twice"),
        (ENTRY.replace("641", "041"), "the ids of cli are DSR640 to DSR649"),
        (ENTRY.replace("DSR641", "DSR1"), "the ids of cli"),
        (ENTRY.replace("  cure: c\n", ""), "expected title, cause, cure"),
        (ENTRY.replace(", cure: 丙", ""), "zh: expected title, cause, cure"),
        (ENTRY.replace("  cause", "  cuase"), "did you mean cause?"),
        (ENTRY.replace("title: a", "title: a."), "without a full stop"),
        (ENTRY.replace("cause: b", "cause: 1"), "cause must be text, found 1"),
        ("DSR641: text\n", "expected title, cause, cure and zh"),
    ],
)
def test_a_faulty_catalogue_is_refused(text, problem, tmp_path, monkeypatch):
    (tmp_path / "cli.yaml").write_text(text)
    monkeypatch.setattr(messages, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=re.escape(problem)):
        load_layer("cli")


@pytest.mark.parametrize("spelling", ["DSR640", "dsr640", "[DSR640]", "640"])
def test_explain_prints_title_cause_and_cure(spelling, capsys, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    assert explain.main([spelling]) == 0
    out = capsys.readouterr().out
    message = load_all()["DSR640"]
    assert out.startswith(f"DSR640  {message.en.title}\n") and all(len(line) <= 80 for line in out.splitlines())
    assert f"cause: {message.en.cause} cure: {message.en.cure}" in " ".join(out.split())
    assert explain.main([spelling, "--lang", "zh"]) == 0
    out = capsys.readouterr().out
    assert out == f"DSR640  {message.zh.title}\n  原因：{message.zh.cause}\n  處理：{message.zh.cure}\n"


@pytest.mark.parametrize(
    ("env", "lang"),
    [
        ({}, "en"),
        ({"LANG": "zh_TW.UTF-8"}, "zh"),
        ({"LANG": "zh_TW.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LC_ALL": "", "LANG": "zh_TW"}, "zh"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, "zh"),
    ],
)
def test_the_language_follows_the_environment(env, lang):
    assert explain.language(env) == lang


def test_explain_lists_all_ids(capsys, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    assert cli.main(["explain"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{code}  {each.en.title}" for code, each in load_all().items()]
    assert cli.main(["explain", "642", "DSR640"]) == 0
    assert re.findall(r"^DSR\d{3}", capsys.readouterr().out, re.MULTILINE) == ["DSR642", "DSR640"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["DSR999"], ["DSR999", "nearest is DSR6", "[DSR640]"]),
        (["DSR640", "DSR000"], ["DSR000", "nearest is DSR", "[DSR640]"]),
        (["DSRx"], ["DSRx", "DSR042", "[DSR640]"]),
        (["--lang", "fr"], ["fr", "zh"]),
    ],
)
def test_an_unknown_id_is_one_message(argv, parts, capfd):
    message = refusal(cli.main, ["explain", *argv], capfd)
    assert all(part in message for part in parts), message


def test_explain_imports_nothing_heavy():
    code = (
        "import sys; from dsrecipes.cli import main; code = main(['explain', 'DSR640']); "
        "sys.exit(code or 10 * bool({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=env).returncode == 0


def test_an_id_may_be_shared_with_layers_above_its_own():
    assert is_owned("DSR005", {"io"}) and is_owned("DSR005", {"io", "data"})
    assert (
        not is_owned("DSR005", {"data"}) and not is_owned("DSR600", {"recipes", "data"}) and not is_owned("DSR999", {"io"})
    )
