"""One parser for YAML, flags and Python keywords."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from enum import Enum
from functools import cache
from typing import Any, NoReturn

from transformers import HfArgumentParser

from dsrecipes.config.adapter import take_settings
from dsrecipes.config.batch import BATCH_KEYS
from dsrecipes.config.flags import FIXED, JUDGED_SCHEDULES, refuse_unknown, refuse_unsuited
from dsrecipes.config.layers import Layers, seconds_of
from dsrecipes.config.schema import CONFIG_CLASSES, Config, DataConfig, ModelConfig, TrainConfig, require
from dsrecipes.config.zero_values import ENGINE_KEYS
from dsrecipes.errors import UserError, nearest

_POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
)


_SMALLER_IS_BETTER = ("loss", "perplexity", "ppl", "error", "wer", "cer", "ter", "mae", "mse", "rmse", "runtime")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser() -> HfArgumentParser:
    """The one parser, over the three dataclasses."""
    return _Parser([*CONFIG_CLASSES], allow_abbrev=False)


def _argv(key: str, value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [f"--{key}", *(json.dumps(item) if isinstance(item, (dict, list)) else str(item) for item in value)]
    if isinstance(value, dict):
        try:
            return [f"--{key}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise UserError(f"--{key}: {error}") from None
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]


def build_config(layers: Layers) -> Config:
    """Check the layered values: unknown keys, types, choices, ranges.

    Raises:
        UserError: one message for the first key at fault, with where its value comes from.
    """
    merged = layers.merged()
    refuse_unknown(merged, {f.name for c in CONFIG_CLASSES for f in dataclasses.fields(c) if f.init})
    refuse_unsuited(merged)
    merged = {key: (_spelled(key, value), origin) for key, (value, origin) in merged.items()}
    # refuse_unsuited has seen that a fixed flag has its one value, which its type need not be able to express
    merged = {key: pair for key, pair in merged.items() if pair[0] is not None and key not in FIXED}
    notes: list[str] = []
    take_settings(merged, layers.by_user(), notes)
    given = {key: origin for key, (_, origin) in merged.items()}
    for key in ENGINE_KEYS:  # an optimizer or scheduler of DeepSpeed's, whose names Trainer does not know
        if key in layers.zero_json().values:
            merged.pop(key, None)
    flags = parser()
    single = {action.dest for action in flags._actions if action.nargs in (None, "?")}
    for key, (value, origin) in merged.items():
        if key in single and isinstance(value, (list, tuple)):
            raise UserError(f"--{key}: expected one value, found {len(value)}: {' '.join(map(str, value))} ({origin})")
    try:
        namespace, rest = flags.parse_known_args([arg for key, (v, _) in merged.items() for arg in _argv(key, v)])
    except UserError as error:
        raise _with_origin(str(error), given) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: a value with spaces needs quotes")
    values = vars(namespace)
    try:
        model = ModelConfig(**{f.name: values[f.name] for f in dataclasses.fields(ModelConfig)})
        data = DataConfig(**{f.name: values[f.name] for f in dataclasses.fields(DataConfig)})
        train = {f.name: values[f.name] for f in dataclasses.fields(TrainConfig) if f.init}
        for key in BATCH_KEYS:
            if key not in merged:
                train[key] = None  # derived, once the number of ranks is known
        if "torch_compile" in given and not train["torch_compile"]:
            # transformers would take either as a request to compile
            train["torch_compile_backend"] = train["torch_compile_mode"] = None
        _check_train(train, given)
    except ValueError as error:
        named = re.search(r"--(\w+)", str(error))
        zero = layers.zero_json()
        raise UserError(f"{zero.origin}: {error}" if named and named[1] in zero.values else str(error)) from None
    for key, value in {"model_name_or_path": values["model_name_or_path"], "dataset": data.sources}.items():
        if not value:
            raise UserError(f"--{key} is missing: a recipe has no default for it, give one by flag or YAML")
    return Config(model, data, train, layers, given, notes)


_OFF_WORD = {"deepspeed": "none", "report_to": "none", "debug": None, "time_limit": None, "resume_from_checkpoint": None}
"""What `no`, `off` and false mean for a flag that takes words, where it is not `no`; None: as if it were not given."""


def _spelled(key: str, value: Any) -> Any:
    """`on` and `off` as true and false for a switch, and a false as the word that a flag with words has for it."""
    is_list_of_one = isinstance(value, (list, tuple)) and len(value) == 1
    text = str(value[0] if is_list_of_one and key in _OFF_WORD else value).lower()
    if text not in ("on", "off", "no", "false"):
        return None if text == "" and _OFF_WORD.get(key, "none") is None else value
    if key in _switches():
        return str(text == "on").lower()
    if key in _OFF_WORD or "no" in _choices().get(key, ()):
        return _OFF_WORD.get(key, "no")
    return value


@cache
def _switches() -> set[str]:
    """Fields that are true or false."""
    hints = {name: hint for config_class in CONFIG_CLASSES for name, hint in typing.get_type_hints(config_class).items()}
    return {name for name, hint in hints.items() if hint is bool or set(typing.get_args(hint)) == {bool, type(None)}}


@cache
def _choices() -> dict[str, list[str]]:
    """Fields of TrainConfig that take one of some words -> the words."""
    return {
        name: [str(choice.value) for choice in option]
        for name, hint in typing.get_type_hints(TrainConfig).items()
        for option in typing.get_args(hint)
        if isinstance(option, type) and issubclass(option, Enum)
    }


def _with_origin(message: str, given: dict[str, str]) -> UserError:
    match = re.match(r"argument --(\w+)[^:]*: (.*)", message, flags=re.DOTALL)
    if not match:
        return UserError(message)
    key, problem = match.groups()
    return UserError(f"--{key}: {problem} ({given.get(key, 'flag')})")


def _check_train(train: dict[str, Any], given: dict[str, str]) -> None:
    """What TrainingArguments would refuse only after the data are prepared; ValueError names the flag."""
    for name, choices in _choices().items():
        require(
            train[name] in choices,
            f"--{name} {train[name]}{nearest(str(train[name]), choices)}: choose from {', '.join(choices)}",
        )
    for name in TrainConfig._VALID_DICT_FIELDS:
        if name == "deepspeed" or train[name] is None:
            continue
        try:
            is_object = isinstance(json.loads(train[name]), dict)
        except ValueError as error:
            raise ValueError(f"--{name} {train[name]}: not JSON ({error}); {given.get(name, 'flag')}") from None
        require(is_object, f"--{name} {train[name]}: give a JSON object, such as '{{\"key\": 1}}'")
    for name, value in train.items():
        if isinstance(value, (int, float)):
            require(abs(value) < 2**63, f"--{name} is {value}: give a number that is finite and below 2**63")
    for name in ("seed", "data_seed"):
        require(train[name] is None or 0 <= train[name] < 2**32, f"--{name} is {train[name]}: give 0 up to 2**32 - 1")
    for name in _POSITIVE:
        require(train[name] is None or train[name] > 0, f"--{name} is {train[name]}: give a number above 0")
    steps = train["max_steps"]
    require(steps == -1 or steps > 0, f"--max_steps is {steps}: give 1 or more, or -1 for --num_train_epochs")
    require(
        "tpu_metrics_debug" not in (train["debug"] or ()),
        "--debug tpu_metrics_debug: no TPU trains here; choose underflow_overflow",
    )
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "hang_timeout", "neftune_noise_alpha"):
        require(train[name] is None or train[name] >= 0, f"--{name} is {train[name]}: give 0 or more")
    if train["time_limit"]:
        seconds_of(train["time_limit"])
    patience = train["early_stopping_patience"]
    require(patience is None or patience > 0, f"--early_stopping_patience is {patience}: give 1 or more")
    require(
        patience is None or train["eval_strategy"] != "no",
        "--early_stopping_patience needs evaluations: give --eval_strategy steps or epoch",
    )
    judged = [("lr_scheduler_type", schedule) for schedule in JUDGED_SCHEDULES]
    for name, value in (("save_strategy", "best"), ("load_best_model_at_end", True), *judged):
        require(
            train[name] != value or train["eval_strategy"] != "no",
            f"--{name} {str(value).lower()} needs evaluations: give --eval_strategy steps or epoch",
        )
    require(not (train["fp16"] and train["bf16"]), "--fp16 and --bf16 are both on: choose one")
    require(train["global_batch_size"] is None or train["global_batch_size"] > 0, "--global_batch_size must be above 0")
    require(
        not (train["save_only_model"] and train["load_best_model_at_end"]),
        "--save_only_model leaves nothing for --load_best_model_at_end to load: drop one of them",
    )
    require(
        not train["load_best_model_at_end"] or train["save_strategy"] in ("best", train["eval_strategy"]),
        "--load_best_model_at_end needs --save_strategy best, or the same as --eval_strategy",
    )
    require(
        train["train_sampling_strategy"] in ("random", "sequential"),
        f"--train_sampling_strategy {train['train_sampling_strategy']}: rows are laid out by step here; choose random or sequential",
    )


def best_metric(train: dict[str, Any]) -> dict[str, Any]:
    """The values that decide which evaluation is the best, with defaults for those that were not given.

    transformers itself takes a higher value of every metric but a loss as better, while a schedule that follows a metric
    takes a lower one as better.
    """
    name, greater = train["metric_for_best_model"], train["greater_is_better"]
    judged = train["lr_scheduler_type"] in JUDGED_SCHEDULES
    if name is None and (judged or train["early_stopping_patience"] or train["save_strategy"] == "best"):
        name = "loss"
    if name is not None and greater is None:
        greater = name.lower().rsplit("_", 1)[-1] not in _SMALLER_IS_BETTER
    options = json.loads(train["lr_scheduler_kwargs"] or "{}")
    if judged and greater:
        options = {"mode": "max"} | options
    return {
        "metric_for_best_model": name,
        "greater_is_better": greater,
        "lr_scheduler_kwargs": json.dumps(options) if options else None,
    }
