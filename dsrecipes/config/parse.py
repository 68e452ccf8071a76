"""How do layered values become a checked configuration? One parser for YAML, flags and Python keywords."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from argparse import Action
from collections.abc import Collection, Mapping
from enum import Enum
from functools import cache
from typing import Any, NoReturn

from transformers import HfArgumentParser

from dsrecipes.config.adapter import take_settings
from dsrecipes.config.batch import BATCH_KEYS
from dsrecipes.config.checks import check_train
from dsrecipes.config.flags import FIXED, Merged, refuse_unknown, refuse_unsuited
from dsrecipes.config.help import known_flags
from dsrecipes.config.layers import Layers
from dsrecipes.config.schema import Config, DataConfig, FinishedRunConfig, ModelConfig
from dsrecipes.config.zero_values import ENGINE_KEYS
from dsrecipes.errors import UserError

Classes = tuple[Any, ...]
"""Dataclasses whose fields are flags."""
_OFF_WORD = {"deepspeed": "none", "report_to": "none", "debug": None, "time_limit": None, "resume_from_checkpoint": None}
"""What `no`, `off` and false mean for a flag that takes words, where it is not `no`; None: as if it were not given."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("DSR045", message)


def build_config(layers: Layers) -> Config:
    """Check the values of a run that is to be trained: unknown keys, types, choices, ranges.

    Raises:
        UserError: one message for the first key at fault, with where its value comes from.
    """
    from dsrecipes.config.train_config import CONFIG_CLASSES, TrainConfig

    merged, notes = _prepare(layers, CONFIG_CLASSES)
    given = _origins(merged)
    # An optimizer or scheduler of DeepSpeed's has a name that Trainer does not know.
    for key in ENGINE_KEYS:
        if key in layers.zero_json().values:
            merged.pop(key, None)
    values = _typed(merged, CONFIG_CLASSES, given)
    train = {field.name: values[field.name] for field in dataclasses.fields(TrainConfig) if field.init}
    for key in BATCH_KEYS:
        if key not in merged:
            # Derived once the number of ranks is known.
            train[key] = None
    if "torch_compile" in given and not train["torch_compile"]:
        # transformers would take either as a request to compile.
        train["torch_compile_backend"] = train["torch_compile_mode"] = None
    try:
        model, data = _model_and_data(values)
        check_train(train, given, _choices(TrainConfig), TrainConfig._VALID_DICT_FIELDS)
    except UserError as error:
        # A value that the ZeRO JSON sets must be changed there, so the message names the file.
        named = re.search(r"--(\w+)", error.message)
        zero = layers.zero_json()
        raise error.at(zero.origin) if named and named[1] in zero.values else error from None
    return Config(model, data, train, layers, given, notes)


def read_config(layers: Layers) -> Config:
    """Read back the configuration of a finished run, without importing what only training needs.

    `train` holds the fields of FinishedRunConfig alone; all others were checked when the run started.

    Raises:
        UserError: as build_config, for a config.yaml that was edited.
    """
    classes = (ModelConfig, DataConfig, FinishedRunConfig)
    merged, notes = _prepare(layers, classes)
    given = _origins(merged)
    # The flags that only training reads were checked when the run started, and their types are in TrainingArguments.
    fields = {field.name for config_class in classes for field in dataclasses.fields(config_class)}
    values = _typed({key: pair for key, pair in merged.items() if key in fields}, classes, given)
    model, data = _model_and_data(values)
    train = {field.name: values[field.name] for field in dataclasses.fields(FinishedRunConfig)}
    return Config(model, data, train, layers, given, notes)


def _origins(merged: Merged) -> dict[str, str]:
    return {key: origin for key, (_, origin) in merged.items()}


def _prepare(layers: Layers, classes: Classes) -> tuple[Merged, list[str]]:
    """The merged values in one spelling, without those that a flag with one fixed value repeats; and notes on adapters."""
    merged = layers.merged()
    refuse_unknown(merged, known_flags())
    refuse_unsuited(merged)
    spelled = {key: (_spelled(key, value, classes), origin) for key, (value, origin) in merged.items()}
    # refuse_unsuited has checked that a fixed flag has its one value, which its type may be unable to express.
    result = {key: pair for key, pair in spelled.items() if pair[0] is not None and key not in FIXED}
    notes: list[str] = []
    take_settings(result, layers.by_user(), notes)
    return result, notes


def _typed(merged: Merged, classes: Classes, given: Mapping[str, str]) -> dict[str, Any]:
    """Every field's value in its type, defaults included (UserError: a value of another type or choice)."""
    # Everything passes through argparse as words, so that YAML, flags and Python cannot be read differently. No
    # abbreviations: a flag that a later version adds must not change what a script means.
    parser = _Parser([*classes], allow_abbrev=False)
    _refuse_lists(merged, parser._actions)
    argv = [word for key, (value, _) in merged.items() for word in _argv(key, value)]
    try:
        namespace, rest = parser.parse_known_args(argv)
    except UserError as error:
        raise _with_origin(error, given) from None
    if rest:
        raise UserError("DSR033", f"unexpected argument {rest[0]!r}: a value with spaces needs quotes")
    values = vars(namespace)
    if not values["model_name_or_path"]:
        raise _missing("model_name_or_path")
    return values


def _model_and_data(values: Mapping[str, Any]) -> tuple[ModelConfig, DataConfig]:
    model = ModelConfig(**{field.name: values[field.name] for field in dataclasses.fields(ModelConfig)})
    data = DataConfig(**{field.name: values[field.name] for field in dataclasses.fields(DataConfig)})
    if not data.sources:
        raise _missing("dataset")
    return model, data


def _missing(key: str) -> UserError:
    return UserError("DSR046", f"--{key} is missing: a recipe has no default for it, give one by flag or YAML")


def _refuse_lists(merged: Merged, actions: Collection[Action]) -> None:
    single = {action.dest for action in actions if action.nargs in (None, "?")}
    for key, (value, origin) in merged.items():
        if key in single and isinstance(value, (list, tuple)):
            # argparse would report the second value without the name of the flag.
            shown = " ".join(map(str, value))
            raise UserError("DSR045", f"--{key}: expected one value, found {len(value)}: {shown} ({origin})")


def _argv(key: str, value: Any) -> list[str]:
    """A value as words of a command line, which is what HfArgumentParser parses."""
    if isinstance(value, (list, tuple)):
        return [f"--{key}", *(json.dumps(item) if isinstance(item, (dict, list)) else str(item) for item in value)]
    if isinstance(value, dict):
        try:
            return [f"--{key}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise UserError("DSR048", f"--{key}: {error}") from None
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]


def _spelled(key: str, value: Any, classes: Classes) -> Any:
    """`on` and `off` as true and false for a switch, and false as the word that a flag with words has for it."""
    is_list_of_one = isinstance(value, (list, tuple)) and len(value) == 1
    text = str(value[0] if is_list_of_one and key in _OFF_WORD else value).lower()
    if text not in ("on", "off", "no", "false"):
        # Empty text counts as not given for the flags whose word for off is None.
        is_unset = text == "" and _OFF_WORD.get(key, "none") is None
        return None if is_unset else value
    if key in _switches(classes):
        return str(text == "on").lower()
    if key in _OFF_WORD or "no" in _choices(classes[-1]).get(key, ()):
        return _OFF_WORD.get(key, "no")
    return value


@cache
def _switches(classes: Classes) -> set[str]:
    """Fields that are true or false."""
    hints = {name: hint for config_class in classes for name, hint in typing.get_type_hints(config_class).items()}
    return {name for name, hint in hints.items() if hint is bool or set(typing.get_args(hint)) == {bool, type(None)}}


@cache
def _choices(config_class: Any) -> dict[str, list[str]]:
    """Fields that take one of some words (an Enum) -> the words."""
    return {
        name: [str(choice.value) for choice in option]
        for name, hint in typing.get_type_hints(config_class).items()
        for option in typing.get_args(hint)
        if isinstance(option, type) and issubclass(option, Enum)
    }


def _with_origin(error: UserError, given: Mapping[str, str]) -> UserError:
    """Replace argparse's `argument --key: problem` with our form, which says where the value comes from."""
    match = re.match(r"argument --(\w+)[^:]*: (.*)", error.message, flags=re.DOTALL)
    if not match:
        return error
    key, problem = match.groups()
    return UserError(error.code, f"--{key}: {problem} ({given.get(key, 'flag')})")
