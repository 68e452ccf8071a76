"""Optimizer and scheduler blocks of a ZeRO JSON: filled in from the run, and built once before any weights are loaded."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from dsrecipes.errors import UserError, nearest
from dsrecipes.zero.lint import key_table

Json = dict[str, Any]

_ADAM = ("adam", "adamw")
_DEEPSPEED = ("adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "musgd", "muon")
"""Optimizers that DeepSpeed builds itself (runtime/config.py, DEEPSPEED_OPTIMIZERS), in any case of letters."""
_ADAM_PARAMS = {"lr", "betas", "eps", "weight_decay"}
_OWN_PARAMS = {"lion": _ADAM_PARAMS - {"eps"}, "muon": {"lr", "weight_decay"}, "musgd": {"lr", "weight_decay"}}
"""The run's values that an optimizer of DeepSpeed's takes, where they are fewer than those of an Adam."""
_MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger")
_TRIAL_WIDTH = 8
_ENGINE_PARAMS = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
"""Parameters that DeepSpeed removes before it builds an Adam."""


def torch_optimizer(kind: str, params: Json) -> type[torch.optim.Optimizer] | None:
    """The torch class that the engine builds for an optimizer block; None where it is DeepSpeed's own or unknown."""
    if kind.lower() == "adagrad":
        return torch.optim.Adagrad
    if kind.lower() in _ADAM and params.get("torch_adam"):
        plain = kind.lower() == "adam" and not params.get("adam_w_mode", True)
        return torch.optim.Adam if plain else torch.optim.AdamW
    built = None if kind.lower() in _DEEPSPEED else getattr(torch.optim, kind, None)
    return built if isinstance(built, type) and issubclass(built, torch.optim.Optimizer) else None


def fill_optimizer(block: Json, train: Json) -> None:
    """Put the run's values into an optimizer block.

    Args:
        block: changed in place.
        train: the run's training values, which already hold what the JSON fixes.
    """
    params = block.setdefault("params", {})
    kind = block["type"]
    if kind.lower() in _ADAM:  # DeepSpeed's own compiles for a minute or more at first use
        params.setdefault("torch_adam", True)
        if params.get("bias_correction") is True:  # torch's always corrects, and has no such parameter
            del params["bias_correction"]
    built = torch_optimizer(kind, params)
    accepted = set(inspect.signature(built).parameters) if built else _OWN_PARAMS.get(kind.lower(), _ADAM_PARAMS)
    if "betas" not in accepted:  # adam_epsilon means nothing to the eps of another family
        accepted -= {"eps"}
    ours = {
        "lr": train["learning_rate"], "betas": [train["adam_beta1"], train["adam_beta2"]], "eps": train["adam_epsilon"],
        "weight_decay": train["weight_decay"],
    }  # fmt: skip
    params |= {name: value for name, value in ours.items() if name in accepted or name in params}


def fill_scheduler(block: Json, learning_rate: float) -> None:
    """Put the run's learning rate into a scheduler block; Trainer fills in step counts that are left out."""
    from deepspeed.runtime import lr_schedules

    params = block.setdefault("params", {})
    if block["type"] not in lr_schedules.VALID_LR_SCHEDULES:
        return  # check_blocks refuses it
    accepted = inspect.signature(getattr(lr_schedules, block["type"])).parameters
    if "warmup_max_lr" in accepted:
        params["warmup_max_lr"] = learning_rate
    for name in ("warmup_num_steps", "total_num_steps"):
        if name in accepted:
            params.setdefault(name, "auto")


def check_blocks(config: Json, path: Path, accelerator: bool) -> None:
    """Build the optimizer and scheduler of a filled-in JSON for a parameter of one element.

    Raises:
        UserError: DeepSpeed has no such optimizer or scheduler, cannot build it here, or not with these parameters.
    """
    optimizer, scheduler = config.get("optimizer"), config.get("scheduler")
    if optimizer:
        _check_optimizer(optimizer, config, path, accelerator)
    if scheduler:
        _check_scheduler(scheduler, path)


def _check_optimizer(block: Json, config: Json, path: Path, accelerator: bool) -> None:
    kind, params = block["type"], block["params"]
    where = f"{path}: optimizer {kind}"
    if kind.lower() in (name.lower() for name in key_table(None)["removed_optimizers"]):
        raise UserError(f"{where} was removed from DeepSpeed: use AdamW")
    if kind.lower().startswith("mu") and kind.lower() != "muon" and importlib.util.find_spec("mup") is None:
        raise UserError(f"{where} needs the package mup: pip install mup")
    if kind.lower() in ("lamb", "lion") and not accelerator:
        raise UserError(f"{where} needs a GPU; on a CPU use AdamW, or take the optimizer block out and give --optim")
    built = torch_optimizer(kind, params)
    if built is None and kind.lower() not in _DEEPSPEED:
        known = [name for name in vars(torch.optim) if name[0].isupper() and name != "Optimizer"]
        raise UserError(f"{where}: there is no such optimizer{nearest(kind, [*known, *_DEEPSPEED])}")
    stage = config["zero_optimization"]["stage"]
    untested = built is not None and kind.lower() not in _DEEPSPEED
    if untested and stage and not config.get("zero_allow_untested_optimizer"):
        raise UserError(f'{where} is not tested with ZeRO: set "zero_allow_untested_optimizer": true in the JSON to use it')
    if built is torch.optim.Adagrad and stage and "scheduler" not in config:
        raise UserError(
            f"{where} under ZeRO-{stage}: DeepSpeed rebuilds it without the schedule of the run; give a scheduler block too, or "
            "another optimizer"
        )
    if built is not None:
        params = {name: value for name, value in params.items() if name not in _ENGINE_PARAMS}
        _build(built, [torch.nn.Parameter(torch.zeros(1))], params, where)


def _check_scheduler(block: Json, path: Path) -> None:
    from deepspeed.runtime import lr_schedules

    kind = block["type"]
    where = f"{path}: scheduler {kind}"
    if kind not in lr_schedules.VALID_LR_SCHEDULES:
        if hasattr(torch.optim.lr_scheduler, kind):
            raise UserError(
                f"{where} is one of torch's, which DeepSpeed cannot drive under ZeRO: take the scheduler block out and give "
                "--lr_scheduler_type (cosine, linear, ...)"
            )
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        raise UserError(
            f"{where}: there is no such scheduler{nearest(kind, lr_schedules.VALID_LR_SCHEDULES)}; there are {known}"
        )
    total = block["params"].get("total_num_steps", 1)
    if total != "auto" and (not float(total).is_integer() or total < 1):
        raise UserError(f"{where}: total_num_steps is {total}; give a whole number of steps, 1 or more")
    if block["params"].get("warmup_type", "log") not in ("log", "linear"):
        raise UserError(f"{where}: warmup_type is {block['params']['warmup_type']!r}; choose log or linear")
    params = {name: 10 if value == "auto" else value for name, value in block["params"].items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    _build(getattr(lr_schedules, kind), optimizer, params, where)


def _build(kind: type, first: Any, params: Json, where: str) -> None:
    """Build it; whatever it raises about its parameters is the user's to fix."""
    try:
        kind(first, **params)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} cannot be built with params {params}: {reason}") from error


def try_engine(config: Json, path: Path) -> None:
    """Start DeepSpeed with a tiny layer and take one step; all ranks must call it together, with a process group.

    The engine checks much that its configuration does not, such as an optimizer that cannot update shards.

    Raises:
        UserError: the engine does not start, or takes no step.
    """
    import deepspeed

    trial = {key: value for key, value in config.items() if key not in (*_MONITORS, "steps_per_print", "dump_state")}
    trial |= {"gradient_accumulation_steps": 1}
    del trial["train_batch_size"]
    scheduler = config.get("scheduler")
    if scheduler:
        params = {name: 10 if value == "auto" else value for name, value in scheduler["params"].items()}
        trial["scheduler"] = scheduler | {"params": params}
    layer = torch.nn.Linear(_TRIAL_WIDTH, _TRIAL_WIDTH, bias=False)
    optimizer = None
    if "optimizer" not in config:
        optimizer, trial["zero_allow_untested_optimizer"] = torch.optim.AdamW(layer.parameters()), True
    try:
        engine = deepspeed.initialize(
            model=layer, model_parameters=list(layer.parameters()), optimizer=optimizer, config=json.loads(json.dumps(trial))
        )[0]
        inputs = torch.ones(1, _TRIAL_WIDTH, device=engine.device, dtype=next(engine.module.parameters()).dtype)
        engine.set_gradient_accumulation_boundary(True)  # as accelerate does
        engine.backward(engine(inputs).float().mean())
        engine.step()
        engine.destroy()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: DeepSpeed cannot train with it: {reason}") from error


def fixed_steps(config: Json) -> dict[str, int]:
    """Step counts of a scheduler block that the user fixed; Trainer would insist on its own."""
    params = config.get("scheduler", {}).get("params", {})
    return {key: params[key] for key in ("warmup_num_steps", "total_num_steps") if params.get(key, "auto") != "auto"}


class FixedScheduleConfig(HfTrainerDeepSpeedConfig):
    """transformers' view of a ZeRO JSON, which accepts the fixed step counts of a schedule.

    transformers refuses step counts that are not those of the run (trainer_config_finalize, 5.23).
    """

    fixed: tuple[str, ...]

    def fill_match(self, ds_key_long: str, hf_val: Any, hf_key: str | None = None, must_match: bool = True) -> None:
        """Replace "auto" with Trainer's value, and compare any other value, unless it is a fixed step count."""
        super().fill_match(ds_key_long, hf_val, hf_key, must_match and ds_key_long not in self.fixed)


def keep_fixed_steps(trainer_config: HfTrainerDeepSpeedConfig, config: Json) -> None:
    """Keep a schedule's fixed step counts; the object stays the same, because transformers holds a weak reference to it."""
    trainer_config.__class__ = FixedScheduleConfig  # not a new function on it: Trainer pickles it
    trainer_config.fixed = tuple(f"scheduler.params.{key}" for key in fixed_steps(config))
