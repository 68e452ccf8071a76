"""Which of a run's values does a ZeRO JSON fix? Its keys under the names of our flags.

Like layers.py this imports neither torch nor transformers, so that `dsrecipes show` reads a JSON in under a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsrecipes.config.flags import is_true
from dsrecipes.errors import UserError
from dsrecipes.io.text import parse_json, read_text

_FLAGS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "optimizer.type": "optim",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.type": "lr_scheduler_type",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    # After optimizer.params.lr, because the scheduler overwrites the optimizer's rate.
    "scheduler.params.warmup_max_lr": "learning_rate",
}
"""Path of a key in a ZeRO JSON -> our flag."""
ENGINE_KEYS = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs")
"""Flags that, where a ZeRO JSON sets them, name an optimizer or scheduler of DeepSpeed's, which Trainer does not build."""
_OBJECTS = (
    "optimizer",
    "optimizer.params",
    "scheduler",
    "scheduler.params",
    "fp16",
    "bf16",
    "bfloat16",
    "zero_optimization",
)
_SET_BY_SCHEDULER = {
    "OneCycle": ("learning_rate", "warmup_steps", "adam_beta1", "adam_beta2"),
    "LRRangeTest": ("learning_rate", "warmup_steps"),
}
"""Scheduler of DeepSpeed's -> flags that it overwrites at every step with its own parameters."""
_SWITCH_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
"""The words that DeepSpeed's configuration (pydantic) accepts for a switch, as far as people use them."""


def read_zero_json(path: Path) -> dict[str, Any]:
    """Read and check a ZeRO JSON.

    Raises:
        UserError: it is not JSON (with line and column), not an object, has a key twice, or a block that is no object.
    """
    config = _without_comments(parse_json(read_text(path), str(path), unique_keys=True))
    if not isinstance(config, dict):
        raise UserError("DSR064", f"{path}: expected a JSON object")
    for name in _OBJECTS:
        *parent, key = name.split(".")
        block = config.get(parent[0], {}) if parent else config
        if key in block and not isinstance(block[key], dict):
            raise UserError("DSR064", f"{path}: {name} must be an object")
    for name in ("optimizer", "scheduler"):
        if name in config and not isinstance(_at(config, f"{name}.type"), str):
            raise UserError("DSR064", f"{path}: {name} must have a type (text) and params (an object)")
    return config


def _without_comments(value: Any) -> Any:
    """The value without keys such as `_comment` and `//`, which DeepSpeed refuses in some blocks."""
    if not isinstance(value, dict):
        return value
    return {key: _without_comments(inner) for key, inner in value.items() if not key.startswith(("_", "//", "#"))}


def zero_values(path: Path) -> dict[str, Any]:
    """The run's values that a ZeRO JSON fixes; what it leaves out or sets to "auto" stays open.

    None marks a flag that the JSON's optimizer or scheduler does not use.

    Raises:
        UserError: the file cannot be read as a ZeRO JSON.
    """
    config = read_zero_json(path)
    fixed = {flag: _at(config, key) for key, flag in _FLAGS.items() if _is_fixed(_at(config, key))}
    return fixed | _betas(config, path) | _unnamed(config) | _precision(config, path)


def _betas(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Adam's betas, a pair in the JSON and two flags of ours."""
    betas = _at(config, "optimizer.params.betas")
    if not _is_fixed(betas) or betas == ["auto", "auto"]:
        return {}
    if not isinstance(betas, list) or len(betas) != 2:
        raise UserError("DSR064", f"{path}: optimizer.params.betas is {betas!r}; give two numbers, such as [0.9, 0.999]")
    return {"adam_beta1": betas[0], "adam_beta2": betas[1]}


def _unnamed(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the JSON's optimizer and scheduler that have no flag, and flags that its scheduler overwrites."""
    values: dict[str, Any] = {}
    if "optimizer" in config:
        options = [f"{key}={value}" for key, value in _rest(config, "optimizer").items()]
        values["optim_args"] = ",".join(options) or None
    if "scheduler" in config:
        values["lr_scheduler_kwargs"] = _rest(config, "scheduler") or None
        overwritten = _SET_BY_SCHEDULER.get(_at(config, "scheduler.type"), ())
        keeps_betas = _at(config, "scheduler.params.cycle_momentum") is False
        values |= {key: None for key in overwritten if not (keeps_betas and key.startswith("adam_"))}
    return values


def contradiction(theirs: Any, ours: Any) -> bool:
    """Whether two values, as text or typed, mean different things: 2e-5 equals "0.00002", true equals "yes"."""
    if isinstance(theirs, bool) or isinstance(ours, bool):
        return is_true(theirs) != is_true(ours)
    if theirs is None or ours is None:
        return theirs is not ours
    if isinstance(theirs, dict) or isinstance(ours, dict):
        return _as_dict(theirs) != _as_dict(ours)
    try:
        return float(theirs) != float(ours)
    except (TypeError, ValueError, OverflowError):
        # DeepSpeed takes AdamW and adamw as one optimizer.
        return str(theirs).lower() != str(ours).lower()


def _as_dict(value: Any) -> Any:
    """A value that may be the text of a JSON object."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_fixed(value: Any) -> bool:
    return value is not None and value != "auto"


def _at(config: Any, key: str) -> Any:
    """The value at a path such as `optimizer.params.lr`; None where there is none."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _rest(config: dict[str, Any], block: str) -> dict[str, Any]:
    """The fixed parameters of a block that have no flag."""
    known = {key.rpartition(".")[2] for key in _FLAGS if key.startswith(f"{block}.params.")} | {"betas"}
    params = _at(config, f"{block}.params") or {}
    return {key: value for key, value in params.items() if key not in known and _is_fixed(value)}


def _precision(config: dict[str, Any], path: Path) -> dict[str, bool]:
    """bf16 and fp16 as the JSON sets them; both off (fp32) where it turns one off and leaves the other out."""
    switches = {"fp16": _at(config, "fp16.enabled"), "bf16": _at(config, "bf16.enabled")}
    if switches["bf16"] is None:
        # The old name, which DeepSpeed still reads.
        switches["bf16"] = _at(config, "bfloat16.enabled")
    words = {name: str(value).lower() for name, value in switches.items() if value is not None}
    for name, word in words.items():
        if word != "auto" and word not in _SWITCH_WORDS:
            raise UserError("DSR064", f'{path}: {name}.enabled is {word!r}; choose true, false or "auto"')
    enabled = {name: _SWITCH_WORDS[word] for name, word in words.items() if word != "auto"}
    if len(enabled) == 2 and all(enabled.values()):
        raise UserError("DSR051", f"{path}: bf16.enabled and fp16.enabled are both true; keep one")
    # DeepSpeed takes a missing block as off, so one block that is off means fp32.
    if enabled and not any(enabled.values()) and "auto" not in words.values():
        return {"fp16": False, "bf16": False}
    return enabled
