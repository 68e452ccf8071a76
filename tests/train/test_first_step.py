"""Each fault that the first step's audit looks for, on real ranks: one message that names it, the same on every rank."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.models import Small
from support.rank_pool import Ranks

pytestmark = pytest.mark.ranks

SHORT = {"max_steps": 6, "eval_strategy": "no", "save_steps": 2}


def ends(ranks: Ranks, small: Small, folder: Path, name: str, stage: str, spoil: str, **changed: object) -> str:
    """What the run ends with, on every rank."""
    values = SHORT | {"deepspeed": stage, "output_dir": str(folder / "run")} | changed
    (said,) = set(ranks.run("fault", **small.values(name, **values), spoil=spoil))
    return said


@pytest.mark.parametrize(
    ("name", "stage", "spoil", "said"),
    [
        (
            "gpt2",
            "none",
            "detached",
            "transformer.ln_f.weight, transformer.ln_f.bias of 28 trained parameters got no gradient",
        ),
        (
            "gpt2",
            "zero2",
            "detached",
            "transformer.ln_f.weight, transformer.ln_f.bias of 28 trained parameters got no gradient",
        ),
        (
            "gpt2",
            "zero3",
            "detached",
            "transformer.ln_f.weight, transformer.ln_f.bias of 28 trained parameters got no gradient",
        ),
        ("gpt2", "none", "sick_gradient", "ln_1.weight of 28 trained parameters got a gradient with NaN"),
        ("gpt2", "zero2", "sick_gradient", "ln_1.weight of 28 trained parameters got a gradient with NaN"),
        ("gpt2", "zero3", "sick_gradient", "of 28 trained parameters got a gradient with NaN"),
        ("lora", "zero2", "frozen_adapter", "got a gradient of 0 in the first step, so this adapter learns nothing"),
        ("gpt2", "zero2", "unlabelled", "2 rows of rank 0's first step without a label after the collator"),
        ("bert", "zero1", "unlabelled", "2 rows of rank 0's first step without a label after the collator"),
        ("alpaca", "zero3", "leaking", "packing leaks in a LlamaForCausalLM"),
        ("alpaca", "zero2", "unlabelled", "labels, and the same examples apart"),
        ("gpt2", "zero2", "same_rows", "ranks 0 and 1 have the same rows in the first step"),
        ("gpt2", "none", "other_steps", "the ranks have different numbers of micro batches"),
        ("gpt2", "zero2", "not_divided", "ZeRO-3 shards the weights over 2 ranks, but rank 0 holds"),
    ],
)
def test_a_fault_is_named_on_every_rank(
    two_ranks: Ranks, small: Small, tmp_path: Path, name: str, stage: str, spoil: str, said: str
) -> None:
    message = ends(two_ranks, small, tmp_path, name, stage, spoil)
    assert said in message
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    if "after the collator" in said:
        assert re.search(r"(jsonl, lines? |csv, lines? )\d+", message)


@pytest.mark.parametrize("stage", ["none", "zero1", "zero2", "zero3"])
def test_what_each_rank_holds_is_reported(two_ranks: Ranks, small: Small, tmp_path: Path, stage: str) -> None:
    held = two_ranks.run("shares", **small.values("gpt2", **SHORT, deepspeed=stage, output_dir=str(tmp_path / "run")))[0]
    whole = {"weights": 957_440, "gradients": 957_440, "states": {"none": 2, "zero0": 2, "zero3": 2}.get(stage, 3) * 957_440}
    divided = {"none": 0, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}[stage]
    for part, since in (("states", 1), ("gradients", 2), ("weights", 3)):
        share = 0.5 if divided >= since else 1.0
        mine, all_of_it = held[part]
        assert all_of_it == pytest.approx(whole[part], rel=0.01)
        if part == "gradients" and stage == "zero1":
            # whether ZeRO-1 shards gradients is not promised
            continue
        assert mine / all_of_it == pytest.approx(share, rel=0.01)
