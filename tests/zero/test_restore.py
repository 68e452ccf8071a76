"""A run that resumes on another number of ranks, or at another ZeRO stage, continues as if it had started there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.models import Small
from support.rank_pool import Ranks

from dsrecipes import UserError
from dsrecipes.publish.reshape import reshape
from dsrecipes.runs.checkpoint_manifest import is_complete
from dsrecipes.runs.folder import RunFolder

pytestmark = pytest.mark.ranks

STILL = {"eval_strategy": "no", "weight_decay": 0.1, "lora_dropout": 0.0}
"""Nothing random, and two groups of parameters that differ."""


class Sources:
    """Ten steps on two ranks with a checkpoint at step 5, each run once."""

    def __init__(self, ranks: Ranks, small: Small, folder: Path) -> None:
        self.ranks, self.small, self.folder = ranks, small, folder
        self.done: dict[tuple[str, str], dict[str, Any]] = {}

    def get(self, name: str, stage: str) -> dict[str, Any]:
        """What tests/support/rank_cases.py:train returns on rank 0."""
        if (name, stage) not in self.done:
            out = self.folder / f"{name}-{stage}".replace(" ", "-")
            case = self.small.values(name, deepspeed=stage, output_dir=str(out), **STILL)
            self.done[name, stage] = self.ranks.run("train", **case)[0]
        return self.done[name, stage]


@pytest.fixture(scope="module")
def sources(two_ranks: Ranks, small: Small, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(two_ranks, small, tmp_path_factory.mktemp("sources"))


def checkpoint(run: dict[str, Any]) -> Path:
    """The checkpoint in the middle of a run."""
    return RunFolder(Path(run["path"])).checkpoints / "checkpoint-5"


def same(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    """Steps 6 to 10 and the model that they make."""
    theirs, ours = ({line["step"]: line for line in run["log"] if "loss" in line} for run in (whole, resumed))
    assert sorted(ours) == [6, 7, 8, 9, 10]
    for step, line in ours.items():
        assert line["loss"] == pytest.approx(theirs[step]["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], abs=1e-5)
        assert (line["learning_rate"], line["epoch"]) == (theirs[step]["learning_rate"], theirs[step]["epoch"])
    same_weights(resumed, whole)


def same_weights(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    """The saved models or adapters are the same, up to fp32's rounding, which differs with the instruction set."""
    tensors = [load_file(next(Path(run["path"], "model").glob("*.safetensors"))) for run in (whole, resumed)]
    assert tensors[0].keys() == tensors[1].keys()
    assert max((tensors[0][key] - tensors[1][key]).abs().max().item() for key in tensors[0]) < 5e-6


STAGES = [
    ("gpt2 without dropout", "zero2", "zero3"),
    ("gpt2 without dropout", "zero3", "zero2"),
    ("gpt2 without dropout", "zero3", "zero0"),
    ("gpt2 without dropout", "none", "zero3"),
    ("gpt2 without dropout", "zero2", "zero3_offload"),
    ("lora", "zero2", "none"),
]


@pytest.mark.parametrize(("name", "before", "after"), STAGES)
def test_another_stage_resumes(
    two_ranks: Ranks, small: Small, sources: Sources, tmp_path: Path, name: str, before: str, after: str
) -> None:
    whole = sources.get(name, before)
    case = small.values(
        name, deepspeed=after, output_dir=str(tmp_path / "run"), resume_from_checkpoint=str(checkpoint(whole)), **STILL
    )
    same(two_ranks.run("train", **case)[0], whole)


def test_one_rank_resumes_what_two_started(one_rank: Ranks, small: Small, sources: Sources, tmp_path: Path) -> None:
    whole = sources.get("gpt2 without dropout", "zero2")
    case = small.values(
        "gpt2 without dropout", deepspeed="zero2", output_dir=str(tmp_path / "run"),
        resume_from_checkpoint=str(checkpoint(whole)), **STILL,
    )  # fmt: skip
    resumed = one_rank.run("train", **case)[0]
    same(resumed, whole)
    assert "checkpoint of 2 ranks, ZeRO-2 resharded for 1 rank, ZeRO-2" in resumed["notes"]


def test_qlora_resumes_at_another_stage(two_ranks: Ranks, small: Small, tmp_path: Path) -> None:
    few = STILL | {"max_steps": 3, "save_steps": 2, "global_batch_size": 2, "validation_split": 0.0}
    whole = two_ranks.run("train", **small.values("qlora", deepspeed="zero3", output_dir=str(tmp_path / "whole"), **few))[0]
    middle = str(tmp_path / "whole" / "checkpoints" / "checkpoint-2")
    case = small.values("qlora", deepspeed="zero2", output_dir=str(tmp_path / "run"), resume_from_checkpoint=middle, **few)
    resumed = two_ranks.run("train", **case)[0]
    (ours,) = [line["loss"] for line in resumed["log"] if "loss" in line]
    assert ours == pytest.approx(whole["metrics"]["train_loss"], abs=1e-5)
    same_weights(resumed, whole)


@pytest.mark.parametrize(("before", "after"), [("zero2", "zero3"), ("zero3", "zero1"), ("none", "none")])
def test_four_ranks_resume_what_two_started(
    four_ranks: Ranks, small: Small, sources: Sources, tmp_path: Path, before: str, after: str
) -> None:
    name = "gpt2 without dropout"
    whole = sources.get(name, before)
    folder = tmp_path / "run"
    shutil.copytree(whole["path"], folder)
    shutil.rmtree(RunFolder(folder).checkpoints / "checkpoint-10")
    shutil.rmtree(RunFolder(folder).model)
    case = small.values(name, deepspeed=after, output_dir=str(folder), resume_from_checkpoint="auto", **STILL)
    resumed = four_ranks.run("train", **case)[0]
    resumed["log"] = [line for line in resumed["log"] if line["step"] > 5]
    same(resumed, whole)
    assert is_complete(RunFolder(folder).checkpoints / "checkpoint-10")


def test_the_batch_stays_as_large_as_the_checkpoints(
    one_rank: Ranks, small: Small, sources: Sources, tmp_path: Path
) -> None:
    whole = sources.get("gpt2 without dropout", "zero2")
    values = STILL | {
        "deepspeed": "zero2", "resume_from_checkpoint": str(checkpoint(whole)), "global_batch_size": None,
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    case = small.values("gpt2 without dropout", output_dir=str(tmp_path / "run"), **values)
    resumed = one_rank.run("train", **case)[0]
    same(resumed, whole)
    assert resumed["batch"] == (2, 2)


@pytest.mark.parametrize(
    ("name", "before", "after"), [("gpt2 without dropout", "zero3", "zero2"), ("lora", "zero2", "zero3")]
)
def test_a_reshaped_checkpoint_resumes_anywhere(
    one_rank: Ranks, small: Small, sources: Sources, tmp_path: Path, name: str, before: str, after: str
) -> None:
    whole = sources.get(name, before)
    torn = Path(whole["path"], "checkpoints", ".universal-5.partial")
    torn.mkdir()
    made = reshape(whole["path"], checkpoint="step5")
    assert Path(made["path"]).name == "universal-5" and made["bytes"] > 0 and not torn.exists()
    assert not list(Path(made["path"]).glob("**/*states.pt"))
    assert reshape(whole["path"], checkpoint="step5") == made | {"bytes": 0}
    case = small.values(
        name, deepspeed=after, output_dir=str(tmp_path / "run"), resume_from_checkpoint=made["path"], **STILL
    )
    same(one_rank.run("train", **case)[0], whole)


def test_an_undivided_checkpoint_needs_no_reshaping(sources: Sources) -> None:
    whole = sources.get("gpt2 without dropout", "none")
    assert reshape(whole["path"], checkpoint="step5") == {"path": str(checkpoint(whole)), "step": 5, "bytes": 0}


def test_another_model_is_refused(two_ranks: Ranks, small: Small, sources: Sources, tmp_path: Path) -> None:
    whole = sources.get("gpt2 without dropout", "zero2")
    case = small.values(
        "lora", deepspeed="zero3", output_dir=str(tmp_path / "run"), resume_from_checkpoint=str(checkpoint(whole)), **STILL
    )
    with pytest.raises(UserError, match=r"is of another run: recipe is gpt2_clm there and alpaca_llama_sft here"):
        two_ranks.run("train", **case)
