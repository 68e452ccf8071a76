"""LoRA settings: which layers get an adapter, and an adapter folder that is given as a model."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from dsrecipes.config.flags import Merged, is_true
from dsrecipes.errors import UserError
from dsrecipes.io.paths import starter_path, user_path
from dsrecipes.io.text import read_text

CONFIG = "adapter_config.json"
_KEYS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "target_modules"}
"""Flag -> its name in adapter_config.json."""
HEAD = "head_config.json"
"""Beside the adapter of a classifier: what its head needs of the model's configuration, which is the base's own otherwise."""
_PLAIN_NAME = re.compile(r"[\w.-]+")


def lora_targets(values: list[str]) -> list[str] | str:
    """Convert --lora_target_modules for peft: names of layers, one regular expression, or all-linear.

    Raises:
        ValueError: empty text, not a regular expression, or all-linear together with other values.
    """
    is_given = bool(values)
    if len(values) == 1 and values[0].lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # a regular expression can begin with a character class
            values = [str(name) for name in json.loads(values[0])]
    names = [part.strip() for value in values for part in value.split(",") if part.strip()]
    if is_given and not names:
        raise ValueError("--lora_target_modules is empty: give names of layers, or all-linear")
    if "all-linear" in names or not names:
        if len(names) > 1:
            raise ValueError("--lora_target_modules: all-linear means all of them; give it alone")
        return "all-linear"
    if all(map(_PLAIN_NAME.fullmatch, names)):
        return names
    for value in values:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"--lora_target_modules {value}: not a regular expression ({error})") from None
    patterns = [rf"(?:.*\.)?{re.escape(value)}" if _PLAIN_NAME.fullmatch(value) else f"(?:{value})" for value in values]
    return values[0] if len(values) == 1 else "|".join(patterns)


def adapter_folder(name: str | None) -> Path | None:
    """The adapter folder that a model's name points to; None for the name of a whole model."""
    path = user_path(starter_path(name)) if name else Path()
    is_adapter = (path / CONFIG).is_file() and not (path / "config.json").is_file()
    return path if name and is_adapter else None


def read_adapter(folder: Path) -> dict[str, Any]:
    """Read and check an adapter's own configuration.

    Raises:
        UserError: it is damaged, is not LoRA, has no safetensors, or does not name its base.
    """
    where = f"--model_name_or_path {folder}"
    try:
        values = json.loads(read_text(folder / CONFIG))
        kind, base = values["peft_type"], values["base_model_name_or_path"]
        typed = type(values["r"]) is int and values["r"] >= 1 and isinstance(values["target_modules"], (list, str))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: {CONFIG} is damaged ({error})") from error
    if kind != "LORA":
        raise UserError(f"{where}: this is a {kind} adapter; only LoRA adapters can be trained further")
    if not typed:
        raise UserError(f"{where}: {CONFIG} is damaged (r must be a whole number from 1, target_modules a list or a text)")
    if not base or not isinstance(base, str):
        raise UserError(f"{where}: {CONFIG} does not name its base model (base_model_name_or_path): write its path there")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{where}: adapter_model.safetensors is missing")  # peft would take a pickle, or ask the hub
    return values


def head_settings(config: Any) -> dict[str, Any]:
    """What a classifier's head needs of the model's configuration."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    pad = config.get_text_config().pad_token_id
    return {"names": names, "problem_type": config.problem_type, "pad_token_id": pad}


def set_head(config: Any, settings: dict[str, Any]) -> None:
    """Give a configuration another's head_settings."""
    names = [str(name) for name in settings["names"]]
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    config.problem_type = settings["problem_type"]
    config.get_text_config().pad_token_id = settings["pad_token_id"]


def read_head(folder: Path, config: Any) -> None:
    """Give the base's configuration what an adapter folder's HEAD says, where there is one (UserError: it is damaged)."""
    if not (folder / HEAD).is_file():
        return
    try:
        set_head(config, json.loads(read_text(folder / HEAD)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / HEAD} is damaged ({error})") from error


def base_model(name: str) -> str:
    """The model that holds the weights: the base of an adapter folder, or `name` itself."""
    folder = adapter_folder(name)
    return name if folder is None else str(read_adapter(folder)["base_model_name_or_path"])


def take_settings(merged: Merged, by_user: dict[str, str], notes: list[str]) -> None:
    """Replace the layered LoRA settings with the adapter's own, where the model is an adapter folder.

    Args:
        merged: changed in place; the adapter overrides defaults.
        by_user: key -> origin of the values that the user gave.
        notes: gets a line on what was overridden.

    Raises:
        UserError: the user asked for something that contradicts the adapter.
    """
    folder = adapter_folder(str(merged.get("model_name_or_path", ("",))[0] or ""))
    if folder is None:
        return
    values, origin, overridden = read_adapter(folder), str(folder / CONFIG), []
    explicit = {key: value for key, value in merged.items() if key in by_user}
    if is_true(explicit.get("from_scratch", (False,))[0]):
        raise UserError(f"--from_scratch: {folder} is a LoRA adapter, which needs the weights of its base; drop the flag")
    if str(explicit.get("lora_r", (1,))[0]) == "0":
        raise UserError(
            f"--lora_r 0 trains all weights, but {folder} is a LoRA adapter: merge it into its base first with "
            f"`dsrecipes export RUN --to DIR`, and give --model_name_or_path DIR"
        )
    for key, name in _KEYS.items():
        own = values.get(name, 0.0)
        if key in explicit and (key == "lora_dropout" or _same(explicit[key][0], own)):
            continue
        if key in explicit:
            raise UserError(
                f"--{key} {_words(explicit[key][0])} ({explicit[key][1]}), but the adapter {folder} has {_words(own)}: drop the flag; "
                "training continues with the adapter as it is"
            )
        if key in merged and not _same(merged[key][0], own):
            overridden.append(f"{key} {_words(merged[key][0])}")
        merged[key] = (own if isinstance(own, list) or key != "lora_target_modules" else [own], origin)
    instead = f"; its own settings override the recipe's {', '.join(overridden)}" if overridden else ""
    notes.append(f"training continues from the adapter {folder} of {values['base_model_name_or_path']}{instead}")


def _same(value: Any, own: Any) -> bool:
    """Whether a value as it was written equals the adapter's own."""
    try:
        if isinstance(own, (list, str)):
            names = list(map(str, value)) if isinstance(value, (list, tuple)) else [str(value)]
            return _as_set(lora_targets(names)) == _as_set(own)
        return float(value) == float(own)
    except (TypeError, ValueError):
        return False


def _as_set(targets: list[str] | str) -> set[str]:
    return {targets} if isinstance(targets, str) else set(targets)


def _words(value: Any) -> str:
    return ",".join(sorted(map(str, value))) if isinstance(value, (list, tuple)) else str(value)
