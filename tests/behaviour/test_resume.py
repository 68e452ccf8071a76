"""Nothing lost: a run that resumes from a checkpoint ends as if it had not been interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import Runs, Small
from support.rank_pool import Ranks

from dsrecipes.runs.checkpoint_integrity import find_damage
from dsrecipes.runs.checkpoint_manifest import MANIFEST, find_problem, is_complete, list_files
from dsrecipes.runs.folder import RunFolder

pytestmark = pytest.mark.ranks

FIGURES = ("loss", "grad_norm", "learning_rate", "eval_loss", "test_loss", "epoch")


def figures(run: dict[str, Any]) -> list[dict[str, float]]:
    """The lines of log.jsonl without what a clock measures."""
    return [{key: line[key] for key in ("step", *FIGURES) if key in line} for line in run["log"]]


def weights(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a run's saved model or adapter."""
    (file,) = Path(path, "model").glob("*.safetensors")
    return load_file(file)


def without_manifest(checkpoint: Path) -> None:
    """Cut off before the save ended."""
    (checkpoint / MANIFEST).unlink()


def truncated(checkpoint: Path) -> None:
    """Cut off by a full disk: the greatest file is half as long."""
    greatest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with greatest.open("rb+") as file:
        file.truncate(greatest.stat().st_size // 2)


def half_gone(checkpoint: Path) -> None:
    """A file of the save is missing."""
    next(path for path in checkpoint.rglob("*") if path.suffix in (".pt", ".bin", ".pth", ".safetensors")).unlink()


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flipped(checkpoint: Path) -> None:
    """A bit of the optimizer's states has flipped on the disk; names and sizes are right."""
    flip(next(checkpoint.rglob("*optim_states.pt")))


def died(run: dict[str, Any], folder: Path, tear: Callable[[Path], None]) -> Path:
    """A copy of a run's folder as a kill during the save of step 10 would have left it."""
    shutil.copytree(run["path"], folder)
    tear(RunFolder(folder).checkpoints / "checkpoint-10")
    shutil.rmtree(folder / "model")
    (folder / "metrics.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "stage", "tear"),
    [
        ("gpt2", "none", without_manifest),
        ("gpt2", "zero2", shutil.rmtree),
        ("gpt2", "zero3", truncated),
        ("bert", "zero1", flipped),
        ("lora", "zero2", half_gone),
    ],
)
def test_auto_resumes_from_the_newest_complete_checkpoint_to_the_same_end(
    two_ranks: Ranks, runs: Runs, small: Small, tmp_path: Path, name: str, stage: str, tear: Callable[[Path], None]
) -> None:
    whole = runs.get(name, stage)
    folder = died(whole, tmp_path / "run", tear)
    case = small.values(name, deepspeed=stage, output_dir=str(folder), resume_from_checkpoint="auto")
    resumed = two_ranks.run("train", **case)[0]
    assert figures(resumed) == figures(whole)
    cut = next(line["epoch"] for line in whole["log"] if line["step"] == 5)
    assert cut % 1, "the checkpoint must lie inside an epoch"
    # the times show that the first steps were read from the log and not trained again
    times = [(line["step"], line["time"]) for line in whole["log"] if line["step"] <= 5]
    assert [(line["step"], line["time"]) for line in resumed["log"] if line["step"] <= 5] == times
    assert min(line["time"] for line in resumed["log"] if line["step"] > 5) > max(line["time"] for line in whole["log"])
    ours, theirs = weights(resumed["path"]), weights(whole["path"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert is_complete(RunFolder(folder).checkpoints / "checkpoint-10")


@pytest.mark.parametrize("stage", ["none", "zero2", "zero3"])
def test_one_bit_of_any_file_of_a_checkpoint_is_found_and_the_file_named(runs: Runs, tmp_path: Path, stage: str) -> None:
    run = RunFolder(Path(runs.get("gpt2", stage)["path"]))
    path = shutil.copytree(run.checkpoints / "checkpoint-10", tmp_path / "checkpoint-10")
    assert find_problem(path) is None is find_damage(path) and len(list_files(path)) > 8
    for name in [*list_files(path), MANIFEST]:
        flip(path / name)
        assert name in str(find_problem(path) or find_damage(path))
        flip(path / name)
    assert find_problem(path) is None is find_damage(path)


def test_the_same_command_twice_starts_a_run_and_then_finds_it_finished(
    two_ranks: Ranks, small: Small, tmp_path: Path
) -> None:
    command = small.values(
        "gpt2", deepspeed="zero2", max_steps=4, save_steps=2, output_dir=str(tmp_path / "run"), resume_from_checkpoint="auto"
    )
    first = two_ranks.run("train", **command)[0]
    before = weights(first["path"])
    again = two_ranks.run("train", **command)[0]
    assert (first["step"], again["step"]) == (4, 4)
    assert figures(again)[: len(first["log"])] == figures(first)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(again["path"]).items())
