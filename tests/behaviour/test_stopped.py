"""Runs that end early: a loss that is NaN or 0, weights that hold NaN, no memory; the message names rows and remedies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.models import Small
from support.rank_pool import Ranks

pytestmark = pytest.mark.ranks

SHORT = {"max_steps": 6, "eval_strategy": "no", "save_steps": 2}


def ends(ranks: Ranks, small: Small, folder: Path, name: str, stage: str, spoil: str = "nothing", **changed: object) -> str:
    """What the run ends with, on every rank."""
    values = SHORT | {"deepspeed": stage, "output_dir": str(folder / "run")} | changed
    (said,) = set(ranks.run("fault", **small.values(name, **values), spoil=spoil))
    return said


@pytest.mark.parametrize(("world", "stage"), [(1, "zero2"), (2, "none"), (2, "zero3")])
def test_a_rate_that_breaks_the_loss(
    one_rank: Ranks, two_ranks: Ranks, small: Small, tmp_path: Path, world: int, stage: str
) -> None:
    ranks = one_rank if world == 1 else two_ranks
    said = ends(ranks, small, tmp_path, "gpt2", stage, learning_rate=1e18)
    match = re.match(r"step (\d): the (loss is (nan|inf) on rank \d in micro batch|gradients hold NaN)", said)
    assert match, said
    assert re.search(r"prose\.jsonl, lines? \d+", said) and "a tenth of the learning rate (--learning_rate 1e+17)" in said
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step}" for step in (2, 4) if step < int(match[1])]
    if saved:
        assert f"{saved[-1]}: the same command with --output_dir {tmp_path / 'run'} --resume_from_checkpoint auto" in said


def test_a_collator_that_masks_everything_later(two_ranks: Ranks, small: Small, tmp_path: Path) -> None:
    said = ends(two_ranks, small, tmp_path, "gpt2", "zero2", "masked_later")
    assert re.match(r"step 4: the loss is (nan|0).*because no row of the step has a label", said)
    assert "look at the labels of these rows" in said and "checkpoint-2: the same command" in said


def test_a_loss_of_exactly_0(two_ranks: Ranks, small: Small, tmp_path: Path) -> None:
    said = ends(two_ranks, small, tmp_path, "gpt2", "none", "lost_loss")
    assert said.startswith("step 3: the loss is exactly 0 (") and "look at the labels of these rows" in said


@pytest.mark.parametrize("stage", ["none", "zero2", "zero3"])
def test_weights_that_hold_a_nan(two_ranks: Ranks, small: Small, tmp_path: Path, stage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(small.recipes["alpaca"][1]["model_name_or_path"], model)
    (file,) = model.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    said = ends(two_ranks, small, tmp_path, "alpaca", stage, model_name_or_path=str(model))
    assert "hold NaN or infinite numbers (first in model.layers.1.mlp.up_proj.weight)" in said


def test_rows_that_never_end(one_rank: Ranks, small: Small, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        "from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft\n\n\n"
        "class Endless(AlpacaLlamaSft):\n"
        "    @staticmethod\n"
        "    def encode(records, tokenizer, options):\n"
        "        batch = AlpacaLlamaSft.encode(records, tokenizer, options)\n"
        "        eos = tokenizer.eos_token_id\n"
        "        batch['labels'] = [[-100 if label == eos else label for label in row] for row in batch['labels']]\n"
        "        return batch\n"
    )
    case = small.values("alpaca", **SHORT, output_dir=str(tmp_path / "run"))["values"]
    case.pop("profile")
    (said,) = one_rank.run("fault", recipe=str(tmp_path / "endless.py"), values=case, spoil="nothing")
    assert said.startswith("none of the first") and "is trained on an end token" in said


@pytest.mark.parametrize("stage", ["none", "zero2"])
def test_no_memory(fresh_rank: Ranks, small: Small, tmp_path: Path, stage: str) -> None:
    # large enough that the batch, and not the model, is what does not fit
    batch = {"per_device_train_batch_size": 64, "global_batch_size": 64}
    said = ends(fresh_rank, small, tmp_path, "gpt2", stage, "little_memory", **batch)
    assert re.match(r"rank 0 ran out of host memory in step \d: ", said), said
    assert re.findall(r"\n  \d\. (--\w+ \w+)", said) == [
        "--per_device_train_batch_size 32", "--gradient_checkpointing true", "--lora_r 16",
    ]  # fmt: skip
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 1
