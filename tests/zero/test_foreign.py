"""ZeRO JSON files that tutorials pass on: they train unchanged, or one message says what DeepSpeed does with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.models import Small
from support.rank_pool import Ranks
from support.tiny import SHARED, needs_shared, refusal

from dsrecipes import UserError, cli

CASES = SHARED / "cases" / "zero"
LAB = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32, "global_batch_size": 32, "max_grad_norm": 1.0,
       "adam_beta1": 0.9, "adam_beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "scheduler": "WarmupDecayLR", "optimizer": "AdamW"}  # fmt: skip
G2M = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "global_batch_size": 8, "max_grad_norm": 1.0,
       "optimizer": "AdamW"}  # fmt: skip
NOTES = {
    "z2_lab": [
        "asks for fp16",
        "the CPU computes in fp32",
        "sets per_device_train_batch_size",
        "fixes the schedule to 1000 steps",
    ],
    "z2_lab_fp32": ["fixes the schedule to 1000 steps"],
    "g2m": ["the CPU computes in fp32"],
    "g2m_fp32": [],
    "z1_gallery": [],
    "z3_gallery": ["does not gather the weights on saving"],
    "hf_z2": ["sets lr_scheduler_type WarmupLR (not cosine)"],
    "warm500": ["fixes the warm-up: 500 steps"],
    "actckpt": ["activation_checkpointing has no effect", "--activation_checkpointing true"],
    "bfloat16key": ["bfloat16 is an old name, read as bf16"],
    "nozero": [],
    "old_cpu_offload": ["cpu_offload is an old name", "offload_optimizer"],
}
"""File -> parts of the notes in the header."""
VALUES: dict[str, dict[str, Any]] = {
    "z2_lab": LAB, "z2_lab_fp32": LAB, "g2m": G2M, "g2m_fp32": G2M, "bfloat16key": {"precision": "bf16"},
    "warm500": {"scheduler": "WarmupLR"}, "hf_z2": {"scheduler": "WarmupLR", "eps": 1e-8}, "nozero": {"optimizer": "AdamW"},
}  # fmt: skip
STARTS_NOT: dict[str, dict[str, Any]] = {
    "managed_gradient_accumulation": {"managed_gradient_accumulation": False},
    "legacy_stage1": {"zero_optimization": {"stage": 1, "legacy_stage1": True}},
    "grad_accum_dtype": {"data_types": {"grad_accum_dtype": "float99"}, "zero_optimization": {"stage": 2}},
    "LBFGS": {"optimizer": {"type": "LBFGS"}, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 2}},
}
"""JSON that DeepSpeed's configuration takes and its engine does not."""
REFUSED = {
    "z2_gallery": ["offload_param needs stage 3", "only ZeRO-3"],
    "amp": ["removed amp", "fp16, bf16"],
    "cos_torch": ["CosineAnnealingLR", "torch's", "--lr_scheduler_type"],
    "elastic": ["removed elasticity", "train_batch_size"],
    "onebit": ["OneBitAdam was removed", "AdamW"],
    "pld": ["removed progressive_layer_drop"],
    "tp": ["tensor_parallel.autotp_size 2", "not supported"],
    "wandb": ["wandb.enabled needs the package wandb", "pip install wandb"],
}


def rates(block: dict[str, Any], steps: int, peak: float) -> list[float]:
    """The first rates of DeepSpeed's warm-up schedulers, from their definition (runtime/lr_schedules.py)."""
    warm = block["params"]["warmup_num_steps"]
    assert steps < warm
    return [0.0, *(peak * math.log(step) / math.log(warm) for step in range(1, steps))]  # the optimizer begins with 0


@needs_shared
@pytest.mark.ranks
@pytest.mark.parametrize("name", NOTES)
def test_a_tutorials_json_trains_alone_with_its_own_values(one_rank: Ranks, small: Small, tmp_path: Path, name: str) -> None:
    few = {"max_steps": 3, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    own = ("global_batch_size", "per_device_train_batch_size", "learning_rate", "warmup_steps")
    recipe, values = small.recipes["gpt2 without dropout"]
    case = {
        "verify_model": False,
        "use_cpu": True,
        "output_dir": str(tmp_path / "run"),
        "deepspeed": str(CASES / f"{name}.json"),
    }
    assert not set(own) & set(values)
    run = one_rank.run("train_for_values", recipe=recipe, values=values | few | case)[0]
    notes = " | ".join(run["notes"])
    assert all(part in notes for part in NOTES[name]), notes
    assert VALUES.get(name, {}).items() <= run["values"].items(), run["values"]
    config = json.loads((CASES / f"{name}.json").read_text())
    scheduler = config.get("scheduler")
    if scheduler and scheduler["params"]["warmup_num_steps"] != "auto":
        logged = [line["learning_rate"] for line in run["log"] if "learning_rate" in line]
        peak = config["optimizer"]["params"]["lr"]
        assert logged == pytest.approx(rates(scheduler, 3, 1e-3 if peak == "auto" else peak), rel=1e-6)


@needs_shared
@pytest.mark.parametrize("name", REFUSED)
def test_what_deepspeed_refuses_or_ignores_ends_before_weights(
    one_rank: Ranks, small: Small, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError) as error:
        one_rank.run(
            "train", **small.values("alpaca", deepspeed=str(CASES / f"{name}.json"), output_dir=str(tmp_path / "run"))
        )
    assert all(part in str(error.value) for part in [*REFUSED[name], f"{name}.json"]), error.value
    assert not (tmp_path / "run").exists()


@pytest.mark.ranks
@pytest.mark.parametrize("name", STARTS_NOT)
def test_what_the_engine_refuses_is_known_before_weights_are_loaded(
    one_rank: Ranks, small: Small, tmp_path: Path, name: str
) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(STARTS_NOT[name]))
    run = one_rank.run("try_values", **small.values("gpt2", deepspeed=str(path), output_dir=str(tmp_path / "run")))[0]
    assert str(path) in run["refused"] and not run["loaded"], run


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--optim_args", "foo=1"], ["optim_args is not taken by AdamW in", "foo=1 (flag)"]),
        (["--lr_scheduler_kwargs", '{"num_cycles": 2}'], ["lr_scheduler_kwargs is not taken by WarmupLR in"]),
        (["--lr_scheduler_type", "cosine"], ["lr_scheduler_type is WarmupLR in", "cosine (flag)"]),
        (["--optim", "adafactor"], ["optim is AdamW in", "adafactor (flag)"]),
        (["--learning_rate", "1e-4"], ["learning_rate is 2e-05 in", "1e-4 (flag)"]),
        (["--bf16", "yes"], ["fp16 is on in", "bf16 is on (flag)"]),
        (["--max_grad_norm", "0.5", "--warmup_steps", "7"], ["max_grad_norm is 1.0 in", "0.5 (flag)", "warmup_steps is 3 in"]),
        (["--gradient_accumulation_steps", "4"], ["gradient_accumulation_steps is 2 in", "4 (flag)"]),
        (["--global_batch_size", "6"], ["global_batch_size 6 (flag)", "gradient_accumulation_steps 2", "no whole solution"]),
    ],
)  # fmt: skip
def test_what_the_user_gives_twice_is_refused_with_both_origins(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], parts: list[str]
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "fp16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
    }))  # fmt: skip
    message = refusal(cli.main, ["show", "gpt2_clm", "--deepspeed", str(path), *flags], capfd)
    assert all(part in message for part in [*parts, str(path)]), message
