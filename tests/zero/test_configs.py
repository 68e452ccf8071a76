"""Every shipped ZeRO JSON, and those that tutorials pass on, on two real ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.models import Small
from support.rank_pool import Ranks

from dsrecipes import UserError

pytestmark = pytest.mark.ranks

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


class Two:
    """Two steps and one evaluation of gpt2_clm on two ranks, by ZeRO name or JSON."""

    def __init__(self, ranks: Ranks, small: Small, folder: Path) -> None:
        self.ranks, self.small, self.folder = ranks, small, folder
        self.number = 0

    def __call__(self, zero: str | dict[str, Any], timeout: float = 240, **values: Any) -> dict[str, Any]:
        self.number += 1
        path = self.folder / f"{self.number}.json"
        if not isinstance(zero, str):
            path.write_text(json.dumps(zero))
        values = {"max_steps": 2, "eval_steps": 2, "warmup_steps": 0, "save_strategy": "no"} | values
        case = self.small.values(
            "gpt2",
            deepspeed=zero if isinstance(zero, str) else str(path),
            output_dir=str(self.folder / str(self.number)),
            **values,
        )
        return self.ranks.run("train", timeout=timeout, **case)[0]


@pytest.fixture(scope="module")
def two(two_ranks: Ranks, small: Small, tmp_path_factory: pytest.TempPathFactory) -> Two:
    """Two steps on two ranks."""
    return Two(two_ranks, small, tmp_path_factory.mktemp("two-steps"))


@pytest.fixture(scope="module")
def zero2(two: Two) -> list[dict[str, float]]:
    """What the shipped zero2 logs."""
    return figures(two("zero2"))


def figures(run: dict[str, Any]) -> list[dict[str, float]]:
    """Losses, gradient norm and learning rate by log line."""
    return [
        {key: line[key] for key in ("loss", "eval_loss", "grad_norm", "learning_rate") if key in line} for line in run["log"]
    ]


def same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """The lines agree within 1e-5."""
    assert len(ours) == len(theirs) == 3
    for line, other in zip(ours, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.timeout(1700)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_json_gives_the_losses_of_zero2(two: Two, zero2: list[dict[str, float]], path: Path) -> None:
    if "nvme" in path.stem:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            pytest.skip("NVMe offload needs libaio and its headers (apt install libaio-dev)")
    run = two(path.stem, timeout=1500 if "nvme" in path.stem else 240)  # NVMe: DeepSpeed compiles its I/O once a machine
    same(figures(run), zero2)
    requested = json.loads(path.read_text())["zero_optimization"]
    text = Path(run["path"], "ds_config.json").read_text()
    used = json.loads(text)["zero_optimization"]
    assert run["stage"] == used["stage"] == requested["stage"]
    for part in ("offload_optimizer", "offload_param"):
        assert (part in used) == (part in requested)
        assert part not in requested or used[part]["device"] == requested[part]["device"]
    assert '"auto"' not in text


ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
LOSS_SCALE = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
TUTORIAL = {
    "fp16": {"enabled": "auto", **LOSS_SCALE},
    "bf16": {"enabled": "auto"},
    "optimizer": ADAMW,
    "zero_optimization": {
        "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True,
        "reduce_bucket_size": 2e8, "contiguous_gradients": True, "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip
"""The ZeRO-2 example of the Transformers documentation (DeepSpeed integration), without its scheduler."""


def test_an_optimizer_block_gives_the_losses_of_the_flags(two: Two, zero2: list[dict[str, float]]) -> None:
    run = two(TUTORIAL)
    assert json.loads(Path(run["path"], "ds_config.json").read_text())["optimizer"]["type"] == "AdamW"
    # torch's plain AdamW rounds otherwise than the fused one of the flags, which the gradient norm shows first
    same(*([{k: v for k, v in line.items() if k != "grad_norm"} for line in lines] for lines in (figures(run), zero2)))


@pytest.mark.parametrize("enabled", [False, "auto", "false"])
def test_loss_scale_knobs_of_a_precision_that_is_off_change_nothing(
    two: Two, zero2: list[dict[str, float]], enabled: bool | str
) -> None:
    same(figures(two({"fp16": {"enabled": enabled, **LOSS_SCALE}, "zero_optimization": {"stage": 2}})), zero2)


@pytest.mark.parametrize(
    ("scheduler", "total", "rates"),
    [("WarmupLR", {}, [0, 0, 5e-4, 1e-3, 1e-3, 1e-3]), ("WarmupDecayLR", {"total_num_steps": "auto"}, [0, 0, 5e-4, 1e-3, 7.5e-4, 5e-4])],
    ids=["WarmupLR", "WarmupDecayLR"],
)  # fmt: skip
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_scheduler_block_takes_its_numbers_from_the_flags(
    two: Two, scheduler: str, total: dict[str, str], rates: list[float], with_optimizer: bool
) -> None:
    # DeepSpeed's schedulers keep the rate at 0 for two steps, Trainer's for one
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "warmup_type": "linear", **total}
    config = {"optimizer": ADAMW} if with_optimizer else {}
    config |= {"scheduler": {"type": scheduler, "params": params}, "zero_optimization": {"stage": 2}}
    run = two(config, max_steps=6, eval_steps=6, warmup_steps=2)
    assert [line["learning_rate"] for line in run["log"] if "learning_rate" in line] == pytest.approx(rates, abs=1e-9)
    assert '"auto"' not in Path(run["path"], "ds_config.json").read_text()


def test_numbers_as_text_are_taken_where_they_are_equal(two: Two, zero2: list[dict[str, float]]) -> None:
    config = {
        "train_batch_size": "4", "train_micro_batch_size_per_gpu": "1", "gradient_accumulation_steps": "2",
        "gradient_clipping": "1.0", "zero_optimization": {"stage": "2"},
    }  # fmt: skip
    same(figures(two(config)), zero2)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["offload_param needs stage 3", "the stage is 2", "only ZeRO-3 shards parameters"],
        ),
        (
            {"train_batch_size": 16, "zero_optimization": {"stage": 2}},
            ["global_batch_size is 16 in", "4 (python)"],
        ),
        (
            {"train_micro_batch_size_per_gpu": "8", "zero_optimization": {"stage": 2}},
            ["per_device_train_batch_size is 8 in", "1 (python)"],
        ),
        (
            {"gradient_accumulation_steps": 7, "zero_optimization": {"stage": 2}},
            ["global_batch_size 4 (python)", "gradient_accumulation_steps 7 (", "ranks 2"],
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}, "zero_optimization": {"stage": 2}},
            ["learning_rate is 3e-05 in", "0.001 (python)"],
        ),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}},
            ["bf16.enabled and fp16.enabled are both true"],
        ),
    ],
)
def test_a_json_that_contradicts_the_run_is_refused_with_both_numbers(
    two: Two, config: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        two(config)
    for part in parts:
        assert re.search(re.escape(part), str(refusal.value)), refusal.value
