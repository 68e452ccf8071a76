"""Configurations drawn at random, flags x YAML x ZeRO JSON x profile x ranks: each runs as `show` says, or is refused."""

from __future__ import annotations

import ast
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.models import Small
from support.rank_pool import Ranks
from transformers import get_scheduler

from dsrecipes import cli

pytestmark = pytest.mark.ranks
STEPS = 4
FEW = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "verify_model": False,
    "use_cpu": True,
}
FLAGS: dict[str, tuple[Any, ...]] = {
    "per_device_train_batch_size": (1, 2, 3), "gradient_accumulation_steps": (1, 2, 3), "global_batch_size": (2, 4, 6),
    "learning_rate": (2e-5, 1e-3), "warmup_steps": (0, 2, 3), "max_grad_norm": (0.0, 0.5, 1.0), "weight_decay": (0.0, 0.1),
    "adam_beta2": (0.95, 0.999), "lr_scheduler_type": ("linear", "cosine", "constant"), "optim": ("adamw_torch", "adafactor", "sgd"),
    "bf16": (True, False), "fp16": (False,),
}  # fmt: skip
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")


def some(draw: random.Random, choices: dict[str, tuple[Any, ...]], share: float) -> dict[str, Any]:
    """Some of the keys, each with one of its values."""
    return {key: draw.choice(values) for key, values in choices.items() if draw.random() < share}


def drawn_json(draw: random.Random) -> dict[str, Any]:
    """A ZeRO JSON of a tutorial's kind."""
    zero: dict[str, Any] = {"stage": draw.choice((0, 1, 2, 3))}
    if zero["stage"] and draw.random() < 0.3:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = some(draw, {
        "train_batch_size": (2, 4, "auto"), "train_micro_batch_size_per_gpu": (1, 2, "auto"),
        "gradient_accumulation_steps": (1, 2, "auto"), "gradient_clipping": (0.5, 1.0, "auto"), "steps_per_print": (100,),
    }, 0.4) | {"zero_optimization": zero}  # fmt: skip
    if draw.random() < 0.6:
        params = some(
            draw,
            {"lr": (2e-5, "auto"), "betas": ([0.8, 0.99], "auto"), "eps": (1e-7, "auto"), "weight_decay": (0.1, "auto")},
            0.6,
        )
        config["optimizer"] = {"type": draw.choice(("AdamW", "Adam", "adamw")), "params": params}
    if draw.random() < 0.5:
        kind = draw.choice(("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"))
        params = some(
            draw,
            {"warmup_num_steps": (2, 3, "auto"), "total_num_steps": (4, 9, "auto"), "warmup_type": ("linear", "log")},
            0.7,
        )
        params |= (
            {}
            if kind == "WarmupCosineLR"
            else some(draw, {"warmup_min_lr": (0, 1e-6), "warmup_max_lr": (2e-5, "auto")}, 0.5)
        )
        if kind == "WarmupLR":
            params.pop("total_num_steps", None)
        config["scheduler"] = {"type": kind, "params": params}
    for precision in ("fp16", "bf16"):
        if draw.random() < 0.3:
            config[precision] = {"enabled": draw.choice((True, False, "auto"))}
    return config


def drawn_case(draw: random.Random, folder: Path) -> dict[str, Any]:
    """Values for a run, with the files that they name written to `folder`."""
    values: dict[str, Any] = {"profile": draw.choice(("starter", "full")), **some(draw, FLAGS, 0.15)}
    values["deepspeed"] = draw.choice(("none", "zero0", "zero1", "zero2", "zero3", *["json"] * 5))
    if values["deepspeed"] == "json":
        values["deepspeed"] = str(folder / "zero.json")
        (folder / "zero.json").write_text(json.dumps(drawn_json(draw)))
    if draw.random() < 0.4:
        values["config"] = str(folder / "mine.yaml")
        (folder / "mine.yaml").write_text(yaml.safe_dump(some(draw, FLAGS, 0.15)))
    return values


def shown(values: dict[str, Any], ranks: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `dsrecipes show` says of a run."""
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    assert cli.show(["gpt2_clm", "--procs", str(ranks), *words]) == 0, shlex.join(words)
    lines = [
        line.rpartition(" # ")[0].partition(":") for line in capsys.readouterr().out.splitlines() if not line.startswith("#")
    ]
    return {key.strip(): value.strip() for key, _, value in lines}


def expected_rates(said: dict[str, Any]) -> list[float]:
    """The rate of each step, by the scheduler that `show` names, built by its own library."""
    kind, peak, warm = said["lr_scheduler_type"], float(said["learning_rate"]), int(float(said["warmup_steps"]))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    if not kind.startswith("Warmup"):
        scheduler = get_scheduler(kind, optimizer, warm, STEPS)
    else:
        from deepspeed.runtime import lr_schedules

        params = ast.literal_eval(said.get("lr_scheduler_kwargs", "{}")) | {"warmup_num_steps": max(1, warm)}
        if kind != "WarmupLR":
            params.setdefault("total_num_steps", STEPS)
        if kind != "WarmupCosineLR":
            params["warmup_max_lr"] = peak
        scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def check_run(run: dict[str, Any], said: dict[str, Any]) -> None:
    """The engine's own values are those that `show` says."""
    values = run["values"]
    for key in (*BATCH, "max_grad_norm", "weight_decay"):
        assert float(said[key]) == values.get(key, float(said[key])), (key, said[key], values)
    for key in ("adam_beta1", "adam_beta2"):
        assert key not in said or float(said[key]) == values.get(key, float(said[key])), (key, said, values)
    assert values["precision"] == ("bf16" if said.get("bf16") == "true" else "fp32")
    if said["lr_scheduler_type"].startswith("Warmup"):
        assert values["scheduler"] == said["lr_scheduler_type"]
    if said.get("optim", "adamw").lower().startswith("adam"):
        assert values["optimizer"] == "AdamW", values
    else:
        assert values["optimizer"].lower() == said["optim"].lower(), values
    logged = [line["learning_rate"] for line in run["log"] if "learning_rate" in line]
    assert logged == pytest.approx(expected_rates(said), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_drawn_configuration_runs_as_shown_or_is_refused(
    one_rank: Ranks, two_ranks: Ranks, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    refused = 0
    cases = 10 if request.config.getoption("--whole-matrix") else 2
    for number in range(cases):
        draw = random.Random(100 * seed + number)
        folder = tmp_path / str(number)
        folder.mkdir()
        values = small.recipes["gpt2 without dropout"][1] | FEW | drawn_case(draw, folder)
        ranks = draw.choice((1, 2))
        pool = {1: one_rank, 2: two_ranks}[ranks]
        run = pool.run("try_values", recipe="gpt2_clm", values=values | {"output_dir": str(folder / "run")})[0]
        try:
            if "refused" in run:
                refused += 1
                assert not run["loaded"] and not (folder / "run").exists(), run
            else:
                said = shown(values, ranks, capsys)
                check_run(run, said)
                again = shown({"config": str(folder / "run" / "config.yaml")}, ranks, capsys)
                assert {key: again.get(key) for key in BATCH} == {key: said[key] for key in BATCH}, "config.yaml"
        except AssertionError as error:
            raise AssertionError(
                f"seed {100 * seed + number}, {ranks} ranks, {values}, {sorted(folder.glob('*.*'))}: {run}"
            ) from error
    assert refused < cases or cases == 2
