"""Signals and time limits on real ranks: all save at the same step, and a resumed run ends as if it had not stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour.test_resume import figures, weights
from support.models import Runs, Small
from support.rank_pool import Ranks

from dsrecipes import UserError
from dsrecipes.runs.folder import RunFolder

pytestmark = pytest.mark.ranks


def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_was_not(
    two_ranks: Ranks, runs: Runs, small: Small, tmp_path: Path
) -> None:
    whole = runs.get("gpt2", "zero2")
    folder = RunFolder(tmp_path / "run")

    def start(**events: Any) -> dict[str, Any]:
        case = small.values("gpt2", deepspeed="zero2", output_dir=str(folder.path), resume_from_checkpoint="auto")
        answers = two_ranks.run("disturbed", **case, events={key.replace("_", " "): value for key, value in events.items()})
        assert answers[0].get("why") == answers[1].get("why")
        return answers[0]

    first = start(**{"3": [["signal", 1, signal.SIGTERM]]})
    assert first["stopped"] == "RunStopped" and f"stopped by SIGTERM at step 3 of 10, saved in {folder.path}" in first["why"]
    assert "--resume_from_checkpoint auto resumes" in first["why"]
    second = start(**{"4": [["signal", 0, signal.SIGUSR1]], "evaluation_5": [["signal", 1, signal.SIGINT]]})
    assert "stopped by Ctrl-C (SIGINT) at step 5 of 10" in second["why"]
    assert [path.name for path in folder.complete_checkpoints()][-2:] == ["checkpoint-4", "checkpoint-5"]
    assert not any("eval_loss" in line for line in map(json.loads, folder.log.read_text().splitlines()))
    last = start()
    assert figures(last) == figures(whole)
    ours, theirs = weights(last["path"]), weights(whole["path"])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_time_limit_stops_with_a_checkpoint(two_ranks: Ranks, small: Small, tmp_path: Path) -> None:
    case = small.values("gpt2", deepspeed="zero1", max_steps=5000, eval_strategy="no", save_steps=5000, time_limit="3s", output_dir=str(tmp_path / "run"))  # fmt: skip
    stopped = two_ranks.run("disturbed", **case, events={})[0]
    assert "stopped by the time limit at step" in stopped["why"]
    (saved,) = RunFolder(tmp_path / "run").complete_checkpoints()
    assert int(saved.name[11:]) < 5000 and str(saved) in stopped["why"]


def test_another_learning_rate_is_refused_unless_allowed_and_then_takes_effect(
    two_ranks: Ranks, runs: Runs, small: Small, tmp_path: Path
) -> None:
    run = runs.get("gpt2", "zero1")
    checkpoint = str(RunFolder(Path(run["path"])).checkpoints / "checkpoint-5")
    case = small.values(
        "gpt2", deepspeed="zero1", resume_from_checkpoint=checkpoint, output_dir=str(tmp_path / "run"), learning_rate=2e-3
    )
    with pytest.raises(
        UserError, match=r"of another run: learning_rate is 0.001 there and 0.002 here.*--allow_changed learning"
    ):
        two_ranks.run("train", **case)
    other = case | {"values": case["values"] | {"validation_split": 0.4, "learning_rate": 1e-3}}
    with pytest.raises(UserError, match=r"of another run: data is \w{16} there and \w{16} here.*--allow_changed data"):
        two_ranks.run("train", **other)
    case["values"] |= {"max_steps": 20, "allow_changed": ["learning_rate"]}
    with pytest.raises(UserError, match=r"max_steps is 10 there and 20 here"):
        two_ranks.run("train", **case)
    case["values"] |= {"max_steps": 10, "seed": 7, "allow_changed": ["learning_rate", "sede"]}
    with pytest.raises(UserError, match=r"--allow_changed sede: no such term \(did you mean seed\?\)"):
        two_ranks.run("train", **case)
    case["values"] |= {"seed": 42, "allow_changed": ["learning_rate"]}
    changed = two_ranks.run("train", **case)[0]
    rates = {line["step"]: line["learning_rate"] for line in run["log"] if "learning_rate" in line}
    ours = {line["step"]: line["learning_rate"] for line in changed["log"] if "learning_rate" in line}
    assert ours and ours == pytest.approx({step: 2 * rates[step] for step in ours})


def test_a_run_cannot_resume_from_a_checkpoint_of_the_model_alone(one_rank: Ranks, small: Small, tmp_path: Path) -> None:
    case = small.values("gpt2", max_steps=2, save_steps=1, save_only_model=True, output_dir=str(tmp_path / "run"))
    one_rank.run("train", **case)
    case["values"] |= {"resume_from_checkpoint": "auto", "max_steps": 4}
    with pytest.raises(UserError, match=r"checkpoint-2 holds the model alone \(--save_only_model true\)"):
        one_rank.run("train", **case)


def test_two_runs_do_not_write_into_one_folder(two_ranks: Ranks, small: Small, tmp_path: Path) -> None:
    from filelock import FileLock

    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with FileLock(folder.lock):
        case = small.values("gpt2", deepspeed="zero1", output_dir=str(folder.path), resume_from_checkpoint="auto")
        answer = two_ranks.run("disturbed", **case, events={})[0]
    assert "another process trains in this folder" in answer["why"]
