"""Disks that are full, gone or read-only, and evaluations that fail: the training is not lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour.test_resume import weights
from support.models import Runs, Small
from support.rank_pool import Ranks
from support.tiny import small_disk

from dsrecipes.runs.checkpoint_manifest import is_complete
from dsrecipes.runs.folder import RunFolder

pytestmark = pytest.mark.ranks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 MB."""
    with small_disk(tmp_path / "disk", "size=300m") as path:
        yield path


def ran(ranks: Ranks, small: Small, folder: Path, events: dict[str, list], **changed: Any) -> dict[str, Any]:
    """Run gpt2 at ZeRO-2 in a folder, with events at some steps."""
    case = small.values("gpt2", deepspeed="zero2", output_dir=str(folder), **changed)
    return ranks.run("disturbed", **case, events=events)[0]


def steps_logged(folder: Path) -> list[int]:
    """Steps with a loss in log.jsonl."""
    lines = [json.loads(line) for line in RunFolder(folder).log.read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def same_weights(folder: Path, runs: Runs) -> bool:
    """Whether a run ended as the undisturbed one."""
    ours, theirs = weights(str(folder)), weights(runs.get("gpt2", "zero2")["path"])
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_full_disk_delays_a_save_until_there_is_room(two_ranks: Ranks, runs: Runs, small: Small, disk: Path) -> None:
    folder = disk / "run"
    run = ran(two_ranks, small, folder, {"4": [["fill", 0, str(disk), 0]], "8": [["free", 0, str(disk)]]})
    assert run["said"].count("step 5 is not saved") == 1 and "each step tries again" in run["said"], run["said"]
    assert [path.name for path in RunFolder(folder).complete_checkpoints()] == ["checkpoint-8", "checkpoint-10"]
    assert steps_logged(folder) == list(range(1, 11)) and same_weights(folder, runs)


def test_files_that_may_not_grow_cost_no_training(two_ranks: Ranks, runs: Runs, small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = ran(two_ranks, small, folder, {"4": [["limit", 0, 100]], "8": [["limit", 0, 1 << 40]]})
    for warning in ("step 5 is not saved", "TensorBoard cannot write", "log.jsonl cannot be written"):
        assert run["said"].count(warning) == 1, run["said"]
    assert [path.name for path in RunFolder(folder).complete_checkpoints()] == ["checkpoint-8", "checkpoint-10"]
    assert steps_logged(folder) == list(range(1, 11)) and same_weights(folder, runs)


def test_a_save_that_fails_half_way_ends_the_run_and_leaves_the_last_complete_checkpoint(
    two_ranks: Ranks, runs: Runs, small: Small, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = ran(two_ranks, small, folder, {"4": [["limit", None, 200_000]]}, save_steps=2)
    assert run["stopped"] == "UserError" and "checkpoint-4 could not be saved" in run["why"]
    assert f"The last complete one is {folder / 'checkpoints' / 'checkpoint-2'}" in run["why"]
    assert [path.name for path in RunFolder(folder).all_checkpoints()] == ["checkpoint-2"]
    again = ran(two_ranks, small, folder, {}, save_steps=2, resume_from_checkpoint="auto")
    assert again["step"] == 10 and same_weights(folder, runs)
    assert not (folder / "checkpoints" / "writing").exists()


def test_a_folder_that_is_removed_is_created_again(two_ranks: Ranks, runs: Runs, small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = ran(two_ranks, small, folder, {"3": [["remove", 0, str(folder)]]})
    assert run["step"] == 10 and same_weights(folder, runs)
    # the lines of the first steps were removed with the folder
    assert is_complete(RunFolder(folder).checkpoints / "checkpoint-5") and steps_logged(folder) == list(range(3, 11))


def test_a_folder_that_becomes_read_only_costs_no_training(two_ranks: Ranks, runs: Runs, small: Small, disk: Path) -> None:
    folder = disk / "run"
    run = ran(two_ranks, small, folder, {"3": [["cover", 0, str(folder)]], "7": [["uncover", 0, str(folder)]]})
    assert "step 5 is not saved" in run["said"] and "Read-only file system" in run["said"]
    assert run["step"] == 10 and same_weights(folder, runs) and steps_logged(folder) == list(range(1, 11))
    assert [path.name for path in RunFolder(folder).complete_checkpoints()] == ["checkpoint-7", "checkpoint-10"]


FAILS = """
from dsrecipes.recipes.bert_tmmlu_qa import BertTmmluQa

class Mine(BertTmmluQa):
    def metrics(self, split, train, model_config):
        def figures(prediction):
            raise ZeroDivisionError("no rows of this subject")
        return figures
"""


def test_an_evaluation_that_fails_is_reported_and_training_continues(one_rank: Ranks, small: Small, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(FAILS)
    case = small.values("bert", output_dir=str(tmp_path / "run"))
    run = one_rank.run("disturbed", recipe=str(recipe), values=case["values"] | {"profile": "auto"}, events={})[0]
    assert (
        run["step"] == 10 and "the evaluation at step 5 failed (ZeroDivisionError: no rows of this subject)" in run["said"]
    )
    assert (Path(run["path"]) / "model" / "model.safetensors").is_file()
