"""How optimizer and scheduler blocks of a ZeRO JSON are filled in, and tried before any weights are loaded."""

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
"""Optimizers that DeepSpeed builds itself (0.19.8, runtime/config.py, DEEPSPEED_OPTIMIZERS), case-insensitive."""
_ADAM_PARAMS = {"lr", "betas", "eps", "weight_decay"}
_FEWER_PARAMS = {"lion": _ADAM_PARAMS - {"eps"}, "muon": {"lr", "weight_decay"}, "musgd": {"lr", "weight_decay"}}
"""The run's values that an optimizer of DeepSpeed accepts, where they are fewer than those of an Adam."""
_UNTRIED = (
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
    "flops_profiler",
    "comms_logger",
    "steps_per_print",
    "dump_state",
)
"""Blocks that the trial of an engine leaves out, because they write files or print."""
_TRIAL_WIDTH = 8
_ENGINE_PARAMS = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
"""Parameters that DeepSpeed removes before it builds an Adam."""
_ANY_STEPS = 10
"""Stands for "auto" where only the other parameters of a scheduler are checked."""


def torch_optimizer(kind: str, params: Json) -> type[torch.optim.Optimizer] | None:
    """The torch class that the engine builds for an optimizer block; None for DeepSpeed's own and for unknown names."""
    if kind.lower() == "adagrad":
        return torch.optim.Adagrad
    if kind.lower() in _ADAM and params.get("torch_adam"):
        l2_penalty = kind.lower() == "adam" and not params.get("adam_w_mode", True)
        return torch.optim.Adam if l2_penalty else torch.optim.AdamW
    if kind.lower() in _DEEPSPEED:
        return None
    candidate = getattr(torch.optim, kind, None)
    return candidate if isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer) else None


def fill_optimizer(block: Json, train: Json) -> None:
    """Fill the run's values into an optimizer block.

    Args:
        block: modified in place.
        train: the run's training values, including those that the JSON fixes.
    """
    params = block.setdefault("params", {})
    kind = block["type"]
    if kind.lower() in _ADAM:
        # DeepSpeed's own Adam compiles for a minute or more at first use.
        params.setdefault("torch_adam", True)
        # torch's Adam always corrects the bias, and has no such parameter.
        if params.get("bias_correction") is True:
            del params["bias_correction"]
    torch_class = torch_optimizer(kind, params)
    accepted = (
        set(inspect.signature(torch_class).parameters) if torch_class else _FEWER_PARAMS.get(kind.lower(), _ADAM_PARAMS)
    )
    # The eps of other families is another quantity, to which adam_epsilon does not apply.
    if "betas" not in accepted:
        accepted = accepted - {"eps"}
    values = {
        "lr": train["learning_rate"],
        "betas": [train["adam_beta1"], train["adam_beta2"]],
        "eps": train["adam_epsilon"],
        "weight_decay": train["weight_decay"],
    }
    params |= {name: value for name, value in values.items() if name in accepted or name in params}


def fill_scheduler(block: Json, learning_rate: float) -> None:
    """Fill the run's learning rate into a scheduler block; Trainer fills in step counts that are left out."""
    from deepspeed.runtime import lr_schedules

    params = block.setdefault("params", {})
    if block["type"] not in lr_schedules.VALID_LR_SCHEDULES:
        # check_blocks refuses it, with a message.
        return
    accepted = inspect.signature(getattr(lr_schedules, block["type"])).parameters
    if "warmup_max_lr" in accepted:
        params["warmup_max_lr"] = learning_rate
    for name in ("warmup_num_steps", "total_num_steps"):
        if name in accepted:
            params.setdefault(name, "auto")


def check_blocks(config: Json, path: Path, accelerator: bool) -> None:
    """Build the optimizer and scheduler of a filled-in JSON for a parameter of one element.

    Args:
        path: of the JSON, for the message.
        accelerator: whether the run uses one.

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
    name, source = kind.lower(), f"{path}: optimizer {kind}"
    if name in (removed.lower() for removed in key_table(None)["removed_optimizers"]):
        raise UserError("DSR263", f"{source} was removed from DeepSpeed: use AdamW")
    # muadam, muadamw and musgd.
    if name.startswith("mu") and name != "muon" and importlib.util.find_spec("mup") is None:
        raise UserError("DSR264", f"{source} needs the package mup: pip install mup")
    # DeepSpeed has them as CUDA extensions (FusedLamb, FusedLion).
    if name in ("lamb", "lion") and not accelerator:
        raise UserError(
            "DSR264", f"{source} needs a GPU; on a CPU use AdamW, or remove the optimizer block and give --optim"
        )
    torch_class = torch_optimizer(kind, params)
    if torch_class is None and name not in _DEEPSPEED:
        classes = [attribute for attribute in vars(torch.optim) if attribute[0].isupper() and attribute != "Optimizer"]
        raise UserError("DSR263", f"{source}: there is no such optimizer{nearest(kind, [*classes, *_DEEPSPEED])}")
    if torch_class is not None:
        _check_under_zero(torch_class, name, config, source)
        params = {key: value for key, value in params.items() if key not in _ENGINE_PARAMS}
        _build(torch_class, [torch.nn.Parameter(torch.zeros(1))], params, source)


def _check_under_zero(torch_class: type[torch.optim.Optimizer], name: str, config: Json, source: str) -> None:
    """Refuse optimizers of torch that DeepSpeed does not run under ZeRO, or runs without the schedule (UserError)."""
    stage = config["zero_optimization"]["stage"]
    if not stage:
        return
    if name not in _DEEPSPEED and not config.get("zero_allow_untested_optimizer"):
        raise UserError(
            "DSR265", f'{source} is not tested with ZeRO: set "zero_allow_untested_optimizer": true in the JSON to use it'
        )
    if torch_class is torch.optim.Adagrad and "scheduler" not in config:
        raise UserError(
            "DSR265",
            f"{source} under ZeRO-{stage}: DeepSpeed rebuilds it without the schedule of the run; give a scheduler block too, "
            "or another optimizer",
        )


def _check_scheduler(block: Json, path: Path) -> None:
    from deepspeed.runtime import lr_schedules

    kind, params = block["type"], block["params"]
    source = f"{path}: scheduler {kind}"
    if kind not in lr_schedules.VALID_LR_SCHEDULES:
        if hasattr(torch.optim.lr_scheduler, kind):
            raise UserError(
                "DSR267",
                f"{source} is one of torch's, which DeepSpeed cannot use under ZeRO: remove the scheduler block and give "
                "--lr_scheduler_type (cosine, linear, ...)",
            )
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        suggestion = nearest(kind, lr_schedules.VALID_LR_SCHEDULES)
        raise UserError("DSR267", f"{source}: there is no such scheduler{suggestion}; there are {known}")
    for name, steps in fixed_steps({"scheduler": block}).items():
        if not isinstance(steps, (int, float)) or not float(steps).is_integer() or steps < 1:
            raise UserError("DSR268", f"{source}: {name} is {steps!r}; give a whole number of steps, 1 or more")
    if params.get("warmup_type", "log") not in ("log", "linear"):
        raise UserError("DSR268", f"{source}: warmup_type is {params['warmup_type']!r}; choose log or linear")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    _build(getattr(lr_schedules, kind), optimizer, _without_auto_steps(params), source)


def _without_auto_steps(params: Json) -> Json:
    return {key: _ANY_STEPS if value == "auto" else value for key, value in params.items()}


def _build(kind: type, first: Any, params: Json, source: str) -> None:
    """Build an optimizer or scheduler; any exception is about parameters that the user can fix (UserError)."""
    try:
        kind(first, **params)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError("DSR266", f"{source} cannot be built with params {params}: {reason}") from error


def try_engine(config: Json, path: Path) -> None:
    """Start DeepSpeed with a tiny layer and take one step; a collective call, in a process group.

    The engine checks much that its configuration does not, such as an optimizer that cannot update shards.

    Raises:
        UserError: the engine does not start, or takes no step.
    """
    import deepspeed

    # Square and without a bias, so that every ZeRO stage and Muon, which takes matrices only, can update it.
    layer = torch.nn.Linear(_TRIAL_WIDTH, _TRIAL_WIDTH, bias=False)
    trial = _trial_config(config)
    optimizer = None
    if "optimizer" not in config:
        # DeepSpeed calls any optimizer untested that it did not build itself.
        optimizer, trial["zero_allow_untested_optimizer"] = torch.optim.AdamW(layer.parameters()), True
    try:
        engine, *_ = deepspeed.initialize(
            model=layer, model_parameters=list(layer.parameters()), optimizer=optimizer, config=trial
        )
        inputs = torch.ones(1, _TRIAL_WIDTH, device=engine.device, dtype=next(engine.module.parameters()).dtype)
        # As accelerate does before each update.
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(inputs).float().mean())
        engine.step()
        engine.destroy()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError("DSR269", f"{path}: DeepSpeed cannot train with it: {reason}") from error


def _trial_config(config: Json) -> Json:
    """A copy of the run's JSON for one step of a tiny layer."""
    trial = json.loads(json.dumps({key: value for key, value in config.items() if key not in _UNTRIED}))
    trial["gradient_accumulation_steps"] = 1
    del trial["train_batch_size"]
    if trial.get("scheduler"):
        trial["scheduler"]["params"] = _without_auto_steps(trial["scheduler"]["params"])
    return trial


def fixed_steps(config: Json) -> Json:
    """Step counts that the user fixed in a scheduler block, unchecked; Trainer would insist on its own."""
    params = config.get("scheduler", {}).get("params", {})
    return {key: params[key] for key in ("warmup_num_steps", "total_num_steps") if params.get(key, "auto") != "auto"}


class FixedScheduleConfig(HfTrainerDeepSpeedConfig):
    """transformers' view of a ZeRO JSON, with step counts that the JSON fixes.

    transformers 5.23 refuses step counts that differ from those of the run (trainer_config_finalize).
    """

    fixed: tuple[str, ...]

    def fill_match(self, ds_key_long: str, hf_val: Any, hf_key: str | None = None, must_match: bool = True) -> None:
        """Replace "auto" with Trainer's value, and compare any other value, unless it is a fixed step count."""
        super().fill_match(ds_key_long, hf_val, hf_key, must_match and ds_key_long not in self.fixed)


def keep_fixed_steps(trainer_config: HfTrainerDeepSpeedConfig, config: Json) -> None:
    """Keep the fixed step counts of a schedule.

    The object changes its class instead of being replaced, because transformers holds a weak reference to it; a method
    set on the object would not survive, because Trainer pickles it.
    """
    trainer_config.__class__ = FixedScheduleConfig
    trainer_config.fixed = tuple(f"scheduler.params.{key}" for key in fixed_steps(config))
