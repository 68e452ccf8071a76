"""Every command of the README works as it stands there.

How each is checked:
- `dsrecipes list` and `show`, `--help` and `--dry_run`, the Python program: run as they are.
- `dsrecipes train` lines of one rank and the starter profile: run with `--max_steps 2` after their own flags, in the
  README's order in one folder that holds the README's files; run folders lie in that folder.
- lines about a finished run: run as they are, in a folder with one.
- lines for GPUs, hub models or several machines: their flags go through the parser.
- `make` lines: `make -n`, and what it would run goes through the parser.
- launcher lines: tests/test_launchers.py runs them; here their flags go through the parser.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsrecipes.cli import _USES
from dsrecipes.config import build_config
from dsrecipes.find import recipe_names
from dsrecipes.layers import layer, parse_flags

from readme import CHINESE, ENGLISH, blocks, commands, launcher_lines, write_files  # isort: skip
from tiny import ROOT  # isort: skip
from warm import Warm  # isort: skip

PROGRAMS = [block.text for block in blocks() if block.language == "python" and block.file is None]
DSRECIPES = [line for line in commands() if line.startswith("dsrecipes ")]
MAKE = [line for line in commands() if line.startswith("make")]
FOR_OTHER_MACHINES = [line for line in DSRECIPES if "--procs" in line or "--profile full" in line]
TRAINED = [line for line in DSRECIPES if line.startswith("dsrecipes train") and line not in FOR_OTHER_MACHINES]
USED = [line for line in DSRECIPES if line.split()[1] in _USES]
AT_ONCE = [line for line in DSRECIPES if line not in (*FOR_OTHER_MACHINES, *TRAINED, *USED)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README shows."""
    path = tmp_path_factory.mktemp("readme")
    write_files(path)
    return path


@pytest.fixture(scope="module")
def warm(folder: Path) -> Warm:
    """Runs commands in the README's folder."""
    return Warm(folder)


def make(*words: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    return subprocess.run(
        ["make", "-o", ".venv/installed", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def parse(line: str) -> None:
    """Put a training line's flags through the parser; UserError for one that does not exist."""
    words = [word for word in shlex.split(line) if "=" not in word or word.startswith("--")]
    if "dsrecipes.run" in words:
        argv = words[words.index("dsrecipes.run") + 1 :]
    else:
        argv = ["--recipe", *words[2:]] if not words[2].startswith("-") else words[2:]
        for word in {"--procs", "--max_restarts"} & set(argv):
            del argv[argv.index(word) : argv.index(word) + 2]
    build_config(layer(parse_flags(argv)))


def test_every_command_is_checked_by_one_of_the_rules():
    known = {*DSRECIPES, *MAKE, *launcher_lines(), *(line for line in commands() if "--nnodes" in line)}
    assert set(commands()) == known and len(known) >= 40
    assert {line.split()[2] for line in TRAINED} >= {*recipe_names()}


def test_both_languages_show_the_same_commands_and_files():
    assert commands(CHINESE) == commands(ENGLISH)
    ours, theirs = ([(b.file, b.text) for b in blocks(path) if b.file] for path in (ENGLISH, CHINESE))
    assert [file for file, _ in ours] == [file for file, _ in theirs] and len(ours) >= 8
    assert [text for file, text in ours if file != "short.yaml"] == [text for file, text in theirs if file != "short.yaml"]
    programs = [[b.text for b in blocks(path) if b.language == "python"] for path in (ENGLISH, CHINESE)]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("line", AT_ONCE)
def test_a_command_that_answers_at_once(line: str, folder: Path):
    words = [sys.executable, "-m", "dsrecipes.cli", *shlex.split(line)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 5, done.stderr


@pytest.mark.ranks
@pytest.mark.parametrize("line", TRAINED)
def test_a_training_line(line: str, warm: Warm):
    words = shlex.split(line)[1:]
    shortened = [] if {"--dry_run", "--help"} & set(words) else ["--max_steps", "2", "--verify_model", "false"]
    done = warm.dsrecipes(*words, *shortened)
    assert done.code == 0, done.err
    if shortened:
        assert "done      step 2" in done.out
        folder = Path(re.search(r"^model     (\S+)/model ", done.out, re.MULTILINE)[1])
        assert (warm.folder / folder / "metrics.json").is_file()
    elif "--dry_run" in words:
        assert "first example" in done.out and "nothing was trained" in done.out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Warm:
    """Runs commands in a folder with a finished run and the README's files."""
    server = Warm(tmp_path_factory.mktemp("finished"))
    write_files(server.folder)
    done = server.dsrecipes("train", "alpaca_llama_sft", "--max_steps", "1")
    assert done.code == 0 and "verified" in done.out, done.err
    return server


@pytest.mark.ranks
@pytest.mark.parametrize("line", [line for line in USED if "http://" not in line])
def test_a_line_about_a_finished_run(line: str, finished: Warm):
    done = finished.dsrecipes(*shlex.split(line)[1:])
    assert done.code == 0, done.err


@pytest.mark.ranks
def test_the_second_python_program(finished: Warm):
    done = finished.python(PROGRAMS[1])
    assert done.code == 0 and "'loss'" in done.out, done.err


@pytest.mark.ranks
def test_the_python_program(warm: Warm):
    done = warm.python(PROGRAMS[0])
    assert done.code == 0, done.err
    path, step, loss = done.out.splitlines()[-1].split()
    assert path.startswith("runs/gpt2_clm/") and step == "10" and 4 < float(loss) < 8


@pytest.mark.parametrize("line", [*FOR_OTHER_MACHINES, *(line for line in commands() if "dsrecipes.run" in line)])
def test_a_line_for_other_machines_has_no_unknown_flag(line: str):
    parse(line)


@pytest.mark.parametrize("line", [line for line in MAKE if line != "make"])
def test_a_make_line(line: str):
    done = make("-n", *shlex.split(line)[1:])
    assert done.returncode == 0, done.stderr
    lines = [each for each in done.stdout.replace("\\\n", " ").splitlines() if each.startswith(".venv/bin/")]
    assert lines, done.stdout
    for each in lines:
        if "dsrecipes train" in each:
            parse(each)


def test_make_alone_prints_help():
    done = make()
    assert done.returncode == 0 and "make train RECIPE=gpt2_clm" in done.stdout and "DEEPSPEED" in done.stdout


@pytest.mark.parametrize(("words", "said"), [(["RECIPE=nope"], "unknown recipe 'nope'"), ([], "no recipe")])
def test_make_train_without_a_known_recipe_lists_the_known_ones(words: list[str], said: str):
    if not (ROOT / ".venv").is_dir():
        pytest.skip("no .venv")
    done = make("train", *words)
    assert done.returncode == 2 and said in done.stderr
    assert all(name in done.stderr for name in recipe_names())


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_messages_of_the_troubleshooting_table_exist(readme: Path):
    source = "\n".join(path.read_text() for room in ("dsrecipes", "recipes") for path in (ROOT / room).rglob("*.py"))
    table = readme.read_text(encoding="utf-8").split("error:")[-1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in re.findall("`([^`]+)`", row)]
    assert len(messages) > 10
    assert [message for message in messages if message not in source] == []


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_tree_holds_every_file(readme: Path):
    if not (ROOT / ".git").exists():
        pytest.skip("no git")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    tree = next(b.text for b in blocks(readme) if b.language == "text" and b.text.startswith("README.md"))
    listed, room = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        room = name if name.endswith("/") and not line.startswith(" ") else room
        listed.append(name if not line.startswith(" ") else room + name)
    parents = {name for name in listed if any(other != name and other.startswith(name) for other in listed)}
    groups = tuple(name for name in listed if name.endswith("/") and name not in parents)
    assert [name for name in files if name not in listed and not name.startswith(groups)] == []
    assert [name for name in listed if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_links_lead_somewhere(readme: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text(encoding="utf-8")):
        assert (readme.parent / target).exists(), target
