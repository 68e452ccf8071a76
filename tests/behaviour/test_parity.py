"""The same everywhere: stages, batch layouts and evaluation give the same numbers on real ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.models import STAGES, Runs, Small
from support.rank_pool import Ranks
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.ranks

RECIPES = ("gpt2", "bert", "alpaca", "lora", "qlora")


def logged(run: dict[str, Any], key: str) -> list[float]:
    """A figure of log.jsonl, in the order it was written."""
    return [line[key] for line in run["log"] if key in line]


# ---- stages ----


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("name", RECIPES)
def test_each_stage_gives_the_losses_of_plain_pytorch(runs: Runs, name: str, stage: str) -> None:
    plain, zero = runs.get(name, "none"), runs.get(name, stage)
    assert (plain["engine"], plain["stage"]) == ("DistributedDataParallel", None)
    assert (zero["engine"], zero["stage"]) == ("DeepSpeedEngine", int(stage[-1]))
    assert len(logged(plain, "loss")) == 10 and len(logged(plain, "eval_loss")) == 2
    assert logged(zero, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-5)
    assert logged(zero, "eval_loss") == pytest.approx(logged(plain, "eval_loss"), abs=1e-5)
    assert logged(zero, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)
    assert logged(zero, "learning_rate") == logged(plain, "learning_rate")


@pytest.mark.parametrize("world", [1, 2])
def test_runs_of_one_process_each_get_what_they_ask_for(
    one_rank: Ranks, two_ranks: Ranks, small: Small, tmp_path: Path, world: int
) -> None:
    stages = ("zero3", "none", "zero2")
    values = [
        small.values("gpt2", deepspeed=stage, max_steps=3, output_dir=str(tmp_path / stage))["values"] for stage in stages
    ]
    ranks = {1: one_rank, 2: two_ranks}[world]
    zero3, none, zero2 = ranks.run("sequence", recipe="gpt2_clm", runs=values)[0]
    assert (zero3["stage"], zero3["json"]["zero_optimization"]["stage"]) == (3, 3)
    assert (none["stage"], none["json"]) == (None, None)
    assert none["engine"] == ("GPT2LMHeadModel" if world == 1 else "DistributedDataParallel")
    assert (zero2["stage"], zero2["json"]["zero_optimization"]["stage"]) == (2, 2)
    assert logged(none, "loss") == pytest.approx(logged(zero3, "loss"), abs=1e-5)
    assert logged(zero2, "loss") == pytest.approx(logged(zero3, "loss"), abs=1e-5)


# ---- layouts of a batch ----

LAYOUTS = {
    "gpt2 without dropout": [(1, 2, 4, "zero2"), (2, 4, 1, "zero3"), (2, 2, 2, "none")],
    "bert without dropout": [(1, 2, 4, "zero0"), (2, 4, 1, "zero2"), (2, 1, 4, "zero1")],
    "alpaca": [(1, 2, 4, "zero3"), (2, 4, 1, "zero1"), (2, 2, 2, "zero2")],
    "alpaca unpacked": [(1, 2, 4, "zero1"), (2, 4, 1, "zero0"), (2, 1, 4, "zero3")],
}
"""(ranks, micro, accumulation, stage): each layout meets each stage at some recipe."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_eight_rows_a_step_agree_with_eight_at_once(
    one_rank: Ranks, two_ranks: Ranks, small: Small, tmp_path: Path, name: str
) -> None:
    def run(world: int, micro: int, accumulation: int, stage: str) -> dict[str, Any]:
        case = small.values(
            name, global_batch_size=None, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
            max_steps=-1, num_train_epochs=2, max_grad_norm=1.0, adam_epsilon=1e-4, deepspeed=stage, save_strategy="no",
            eval_strategy="epoch", output_dir=str(tmp_path / f"{world}-{micro}-{accumulation}-{stage}"),
        )  # fmt: skip
        return {1: one_rank, 2: two_ranks}[world].run("train", **case)[0]

    # Adam divides by the root of the second moment: a large epsilon keeps rounding of tiny gradients from growing
    whole = run(1, 8, 1, "none")
    rows = whole["rows"]["train"]
    assert rows % 8, "the last step of an epoch must be a short one"
    assert whole["step"] == 2 * math.ceil(rows / 8)
    weights = load_file(Path(whole["path"], "model", "model.safetensors"))
    for layout in LAYOUTS[name]:
        divided = run(*layout)
        assert logged(divided, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5), layout
        assert logged(divided, "eval_loss") == pytest.approx(logged(whole, "eval_loss"), abs=1e-5), layout
        assert logged(divided, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-5, abs=1e-7), layout
        theirs = load_file(Path(divided["path"], "model", "model.safetensors"))
        assert theirs.keys() == weights.keys()
        assert max(float((theirs[key] - weights[key]).abs().max()) for key in weights) <= 1e-5, layout


# ---- the loss is a sum over tokens or rows, over their number ----


def plain_loss(folder: Path, auto_class: str, rows: list[dict[str, Any]]) -> float:
    """Loss of a saved model, one text at a time: summed over tokens (or rows), over their number."""
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    total = count = 0.0
    for row in rows:
        ids, labels = row["input_ids"], torch.tensor(row["labels"])
        with torch.no_grad():
            if labels.dim():
                logits, labels = model(torch.tensor([ids])).logits[0, :-1], labels[1:]
            else:
                kinds = row["token_type_ids"]
                choices = [
                    model(torch.tensor([[i]]), token_type_ids=torch.tensor([[k]])) for i, k in zip(ids, kinds, strict=True)
                ]
                logits, labels = torch.cat([choice.logits for choice in choices], dim=1), labels[None]
        total += float(cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("name", "auto_class", "at_once"),
    [
        ("gpt2 without dropout", "AutoModelForCausalLM", 64),
        ("bert without dropout", "AutoModelForMultipleChoice", 32),
        ("alpaca", "AutoModelForCausalLM", 16),
    ],
)
def test_losses_are_those_of_a_plain_loop_at_any_batch_size_and_number_of_ranks(
    one_rank: Ranks, two_ranks: Ranks, small: Small, tmp_path: Path, name: str, auto_class: str, at_once: int, world: int
) -> None:
    # All rows in one short step of two micro batches a rank, with a learning rate of 0: the loss is that of the weights.
    case = small.values(
        name, global_batch_size=None, per_device_train_batch_size=at_once // 2 // world, gradient_accumulation_steps=2,
        max_steps=1, learning_rate=0.0, deepspeed="zero2", eval_strategy="no", save_strategy="no", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    run = {1: one_rank, 2: two_ranks}[world].run("evaluate", **case, batch_sizes=[1, 2, 5, 64])[0]
    folder = Path(run["path"], "model")
    assert run["rows"]["train"] < at_once
    assert (run["rows"]["train"] < len(run["texts"]["train"])) == (name == "alpaca"), "only instructions are packed"
    assert logged(run, "loss") == pytest.approx([plain_loss(folder, auto_class, run["texts"]["train"])], abs=1e-5)
    held_out = plain_loss(folder, auto_class, run["texts"]["validation"])
    assert list(run["losses"].values()) == pytest.approx([held_out] * 4, abs=1e-5)
    assert run["metrics"]["eval_loss"] == pytest.approx(held_out, abs=1e-5)
