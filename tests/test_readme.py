"""Every command of the README and of docs/ works as it is written there.

How each is checked:
- `dsrecipes list` and `show`, `--help` and `--dry_run`, the Python programs: run as they are.
- `dsrecipes train` lines of one rank and the starter profile: run with `--max_steps 2` after their own flags, in the
  order of the pages in one folder that holds the files that the pages show; run folders lie in that folder. Lines of
  the recipes whose starter profile is SmolLM2 get a chat model of two layers, except the line that names SmolLM2.
- lines about a finished run: run as they are, in a folder with one.
- lines for GPUs, hub models or several machines: their flags go through the parser.
- `make` lines: `make -n`, and what it would run goes through the parser.
- launcher lines: tests/behaviour/test_launchers.py runs them; here their flags go through the parser.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dsrecipes.config.find import recipe_names
from dsrecipes.config.layers import layer, parse_flags
from dsrecipes.config.parse import build_config

from support.fork_server import Done, Warm  # isort: skip
from support.readme_blocks import blocks, commands, launcher_lines, write_files  # isort: skip
from support.tiny import ROOT, tiny_llama  # isort: skip

PROGRAMS = [block.text for block in blocks() if block.language == "python" and block.text.startswith("from ")]
DSRECIPES = [line for line in commands() if line.startswith("dsrecipes ")]
MAKE = [line for line in commands() if line.startswith("make")]
FOR_OTHER_MACHINES = [line for line in DSRECIPES if "--procs" in line or "--profile full" in line]
TRAINED = [line for line in DSRECIPES if line.startswith("dsrecipes train") and line not in FOR_OTHER_MACHINES]
USED = [line for line in DSRECIPES if line.split()[2:3] == ["last"]]
AT_ONCE = [line for line in DSRECIPES if line not in (*FOR_OTHER_MACHINES, *TRAINED, *USED)]
SMOLLM2 = ("alpaca_llama_sft", "qlora_zero3", "seq_classification")
"""Recipes whose starter profile has 135 M parameters."""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chat model of two layers, with room for a question and a solved example in bytes."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    shutil.copytree(tiny_llama(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return str(folder)


def on_small_model(words: list[str], chat_model: str) -> list[str]:
    """The words of a training line, with the small model where the line would load SmolLM2 without naming it."""
    small = {*SMOLLM2} & {*words} and "--model_name_or_path" not in words and "--help" not in words
    return [*words, "--model_name_or_path", chat_model] if small else words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages show."""
    path = tmp_path_factory.mktemp("readme")
    write_files(path)
    return path


@pytest.fixture(scope="module")
def warm(folder: Path) -> Warm:
    """Runs commands in that folder."""
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


@pytest.mark.parametrize("line", AT_ONCE)
def test_a_command_that_answers_at_once(line: str, warm: Warm) -> None:
    done = warm.dsrecipes(*shlex.split(line)[1:])
    assert done.code == 0 and done.out.strip() and not done.err, done.err
    if line.split()[1] in ("list", "show"):
        assert len(done.out.splitlines()) > 5


@pytest.mark.ranks
@pytest.mark.parametrize("line", TRAINED)
def test_a_training_line(line: str, warm: Warm, chat_model: str) -> None:
    words = shlex.split(line)[1:]
    shortened = not {"--dry_run", "--help"} & set(words)
    flags = ["--max_steps", "2", "--verify_model", "false"] if shortened else []
    done = warm.dsrecipes(*on_small_model(words, chat_model), *flags)
    assert done.code == 0, done.err
    if shortened:
        assert "done      step 2" in done.out
        assert (warm.folder / run_folder(done) / "metrics.json").is_file()
    elif "--dry_run" in words:
        assert "first example" in done.out and "nothing was trained" in done.out


def run_folder(done: Done) -> str:
    """The folder that a run's last screen names."""
    model = re.search(r"^model     (\S+)/model ", done.out, re.MULTILINE)
    assert model, done.out
    return model[1]


@pytest.mark.ranks
def test_the_readme_shows_the_lines_that_a_run_prints(warm: Warm) -> None:
    shown = next(block.text for block in blocks() if block.text.startswith("$ dsrecipes train gpt2_clm"))
    done = warm.dsrecipes("train", "gpt2_clm", "--max_steps", "2")
    assert done.code == 0, done.err
    assert labels(done.out) == labels(shown.partition("\n")[2])


def labels(screen: str) -> list[str]:
    """The word in front of each line, which says what the line is about: not of the progress bar, nor of notes, which
    depend on the machine and on the number of steps."""
    first = [line.split()[0] for line in screen.splitlines() if re.match(r"[a-z]+ ", line)]
    return [word for word in first if word not in ("step", "note", "tokenizing")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, chat_model: str) -> Warm:
    """Runs commands in a folder with a finished run and the files that the pages show."""
    server = Warm(tmp_path_factory.mktemp("finished"))
    write_files(server.folder)
    done = server.dsrecipes("train", "alpaca_llama_sft", "--max_steps", "1", "--model_name_or_path", chat_model)
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
    lines = [
        each for each in done.stdout.replace("\\\n", " ").splitlines() if each.startswith((".venv/bin/", ".latest/bin/"))
    ]
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
