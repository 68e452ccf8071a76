"""LoRA settings: which layers get an adapter, and an adapter folder that is given as a model."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from dsrecipes.errors import UserError
from dsrecipes.find import read_text, starter_path, user_path

CONFIG = "adapter_config.json"
_KEYS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "target_modules"}
"""Flag -> its name in adapter_config.json."""
Given = dict[str, tuple[Any, str]]
"""Key -> (value, origin), as the layers of a configuration give them."""
_PLAIN_NAME = re.compile(r"[\w.-]+")


def lora_targets(values: list[str]) -> list[str] | str:
    """--lora_target_modules as peft takes it: names of layers, one regular expression, or all-linear.

    Raises:
        ValueError: not a list, not a regular expression, or all-linear beside other values.
    """
    if len(values) == 1 and values[0].lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # a character class begins like a list
            values = [str(name) for name in json.loads(values[0])]
    names = [part.strip() for value in values for part in value.split(",") if part.strip()]
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
    ends = [rf"(?:.*\.)?{re.escape(value)}" if _PLAIN_NAME.fullmatch(value) else f"(?:{value})" for value in values]
    return values[0] if len(values) == 1 else "|".join(ends)


def adapter_folder(name: str | None) -> Path | None:
    """The folder of an adapter without its base, where a model's name is one."""
    path = user_path(starter_path(name)) if name else Path()
    alone = (path / CONFIG).is_file() and not (path / "config.json").is_file()
    return path if name and alone else None


def read_adapter(folder: Path) -> dict[str, Any]:
    """An adapter's own configuration.

    Raises:
        UserError: it is damaged, no LoRA adapter, has no safetensors, or does not name its base.
    """
    where = f"--model_name_or_path {folder}"
    try:
        values = json.loads(read_text(folder / CONFIG))
        kind, base = values["peft_type"], values["base_model_name_or_path"]
        whole = isinstance(values["r"], int) and isinstance(values["target_modules"], (list, str))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: {CONFIG} is damaged ({error})") from error
    if kind != "LORA":
        raise UserError(f"{where}: this is a {kind} adapter; training continues from LoRA adapters alone")
    if not whole:
        raise UserError(f"{where}: {CONFIG} is damaged (r or target_modules has another type)")
    if not base or not isinstance(base, str):
        raise UserError(f"{where}: {CONFIG} does not name its base model (base_model_name_or_path): write its path there")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{where}: adapter_model.safetensors is missing")  # peft would take a pickle, or ask the hub
    return values


def base_model(name: str) -> str:
    """The model that holds the weights: of an adapter folder its base, else `name` itself."""
    folder = adapter_folder(name)
    return name if folder is None else str(read_adapter(folder)["base_model_name_or_path"])


def take_settings(merged: Given, by_user: dict[str, str], notes: list[str]) -> None:
    """Put an adapter's own settings into the layered values, where the model is an adapter folder.

    Args:
        merged: changed in place; defaults give way to the adapter.
        by_user: key -> origin of the values that the user gave.
        notes: gets a line on what gave way.

    Raises:
        UserError: the user asked for something that contradicts the adapter.
    """
    folder = adapter_folder(str(merged.get("model_name_or_path", ("",))[0] or ""))
    if folder is None:
        return
    values, origin, replaced = read_adapter(folder), str(folder / CONFIG), []
    asked = {key: value for key, value in merged.items() if key in by_user}
    if str(asked.get("from_scratch", (False,))[0]).lower() == "true":
        raise UserError(f"--from_scratch: {folder} is a LoRA adapter, which needs the weights of its base; drop the flag")
    if str(asked.get("lora_r", (1,))[0]) == "0":
        raise UserError(
            f"--lora_r 0 trains all weights, but {folder} is a LoRA adapter: merge it into its base first with "
            f"`dsrecipes export RUN --to DIR`, and give --model_name_or_path DIR"
        )
    for key, name in _KEYS.items():
        own = values.get(name, 0.0)
        if key in asked and (key == "lora_dropout" or _same(asked[key][0], own)):
            continue
        if key in asked:
            raise UserError(
                f"--{key} {_words(asked[key][0])} ({asked[key][1]}), but the adapter {folder} has {_words(own)}: drop the flag; "
                "training continues with the adapter as it is"
            )
        if key in merged and not _same(merged[key][0], own):
            replaced.append(f"{key} {_words(merged[key][0])}")
        merged[key] = (own if isinstance(own, list) or key != "lora_target_modules" else [own], origin)
    gave_way = f"; the recipe's {', '.join(replaced)} gave way to the adapter's own" if replaced else ""
    notes.append(f"training continues from the adapter {folder} of {values['base_model_name_or_path']}{gave_way}")


def _same(asked: Any, own: Any) -> bool:
    """Whether a value that was asked for is the adapter's own."""
    try:
        if isinstance(own, (list, str)):
            values = list(map(str, asked)) if isinstance(asked, (list, tuple)) else [str(asked)]
            return _as_set(lora_targets(values)) == _as_set(own)
        return float(asked) == float(own)
    except (TypeError, ValueError):
        return False


def _as_set(targets: list[str] | str) -> set[str]:
    return {targets} if isinstance(targets, str) else set(targets)


def _words(value: Any) -> str:
    return ",".join(sorted(map(str, value))) if isinstance(value, (list, tuple)) else str(value)
