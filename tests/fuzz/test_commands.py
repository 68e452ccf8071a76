"""The same through the command: fifty hostile command lines end with exit code 2 and a message, or with success."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fork_server import Done, Warm
from support.fuzzing import EVIL, LIMIT, SECRETS, snapshot
from support.tiny import tiny_gpt2

from support.finished_runs import made_run  # isort: skip

pytestmark = pytest.mark.ranks  # fifty processes
CORPUS = Path(__file__).with_name("corpus")
YAMLS = sorted(CORPUS.glob("*.yaml"))
TRAIN = [
    "train",
    "gpt2_clm",
    "--profile",
    "starter",
    "--deepspeed",
    "none",
    "--use_cpu",
    "true",
    "--dry_run",
    "--max_steps",
    "1",
]
LINES: dict[str, list[str]] = {
    # before the imports
    **{f"show {path.name}": ["show", "gpt2_clm", "--config", str(path)] for path in YAMLS},
    "show a folder": ["show", "gpt2_clm", "--config", "."],
    "show not utf8": ["show", "gpt2_clm", "--dataset", os.fsdecode(b"\xff\xfe")],
    "show an escape": ["show", "gpt2_clm", "--dataset", "\x1b]0;x\x07"],
    "show long": ["show", "gpt2_clm", "--config", "x" * 5000],
    "show nobody": ["show", "gpt2_clm", "--config", "~nobody-of-this-name/x"],
    "show a long key": ["show", "gpt2_clm", "--" + "x" * 5000, "1"],
    "show a dash": ["show", "-"],
    "show nothing": ["show", ""],
    "show dots": ["show", "...."],
    "show a traversal": ["show", "../../../../etc/passwd"],
    "unknown": ["\x1b[31m"],
    "train loop": ["train", "loop.py"],
    "train procs": ["train", "gpt2_clm", "--procs", "9" * 5000],
    "train a spelled procs": ["train", "gpt2_clm", "--procs", "\u00b2"],
    "train a folder": ["train", "--config", "folder.yaml"],
    "train not a recipe": ["train", "spoiled.py", "--config", "loop.yaml"],
    "report nothing": ["report", "nowhere"],
    "report a loop": ["report", "loop.yaml"],
    "report nobody": ["report", "~nobody-of-this-name/x"],
    "report long": ["report", "run", "--out", "x" * 5000],
    "report a nul": ["report", "run-with-nul"],
    "report a spoiled log": ["report", "spoiled-run", "--out", "spoiled.html", "--lang", "en"],
    "report an attachment": ["report", "spoiled-run", "--out", "attached.html", "--attach", "deep.json"],
    "verify nothing": ["verify", "nowhere"],
    "verify no run": ["verify", "."],
    "export last": ["export", "last", "--to", "x"],
    "export long": ["export", "run", "--to", "x" * 5000],
    "generate nothing": ["generate", "nowhere", "--prompts", "x"],
    "judge a rubric": ["judge", "run", "--judge", "http://127.0.0.1:9/v1", "--judge_model", "x", "--rubric", "spoiled.py"],
    "judge nothing": ["judge", "run", "--judge", "~nobody-of-this-name/x"],
    # after them
    "train epochs": [*TRAIN, "--num_train_epochs", "inf"],
    "train a bomb": [*TRAIN, "--dataset", str(CORPUS / "bomb.jsonl.gz")],
    "train digits": [*TRAIN, "--dataset", str(CORPUS / "many-digits.jsonl")],
    "train a zero": [*TRAIN[:4], "--dry_run", "--deepspeed", str(CORPUS / "deep-zero.json")],
    "train code": [*TRAIN, "--model_name_or_path", "evil"],
    "generate an index": ["generate", "spoiled-run", "--prompts", "asked.txt"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the commands run in, with what they are given."""
    base = tmp_path_factory.mktemp("commands")
    here = base / "here"
    here.mkdir()
    for name in ("loop.py", "loop.yaml"):
        (here / name).symlink_to(name)
    (here / "folder.yaml").mkdir()
    (here / "spoiled.py").write_bytes(b"class \0\xff")
    (here / "asked.txt").write_text("Where is the station?")
    (here / "deep.json").write_text("[" * 5000)
    made_run(here / "run", "gpt2_clm", tiny_gpt2())
    spoiled = made_run(here / "spoiled-run", "gpt2_clm", tiny_gpt2())
    (spoiled / "log.jsonl").write_bytes(b'{"step": 1, "loss": 2}\n{"step": \xff}\n' + b"[" * 5000)
    (spoiled / "metrics.json").write_text('{"train_loss": ' + "9" * 5000 + "}")
    index = {"metadata": {}, "weight_map": {"x": "../../../../etc/passwd"}}
    (spoiled / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    evil = shutil.copytree(tiny_gpt2(), here / "evil")
    code = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (evil / "config.json").write_text(json.dumps(json.loads((evil / "config.json").read_text()) | code))
    (evil / "evil.py").write_text(f"open({str(EVIL)!r}, 'w')")
    return here


@pytest.fixture(scope="module")
def ended(place: Path) -> Callable[[str], Done]:
    """How a line ended; each runs once."""
    warm = Warm(place, timeout=6 * LIMIT, **SECRETS, CUDA_VISIBLE_DEVICES="")
    return functools.cache(lambda name: warm.dsrecipes(*LINES[name]))


def test_there_are_fifty() -> None:
    assert len(LINES) >= 50


@pytest.mark.parametrize("name", LINES)
def test_it_ends_with_a_message_or_with_success(ended: Callable[[str], Done], name: str) -> None:
    result = ended(name)
    text = result.out + result.err
    assert result.code in (0, 2), result
    assert "Traceback" not in text
    assert "\x1b" not in text
    assert not any(secret in text for secret in SECRETS.values())
    if result.code == 2:
        assert any(line.startswith("error: ") and len(line) > 20 for line in text.splitlines()), result


def test_nothing_else_happened(ended: Callable[[str], Done], place: Path) -> None:
    for name in LINES:
        ended(name)
    assert not EVIL.exists() and set(place.parent.iterdir()) == {place}
    made = {Path(path).relative_to(place).parts[0] for path in snapshot(place)}
    assert made == {"asked.txt", "deep.json", "evil", "run", "spoiled-run", "spoiled.py", "spoiled.html"}
    assert not any(
        secret.encode() in path.read_bytes() for path in place.rglob("*") if path.is_file() for secret in SECRETS.values()
    )
