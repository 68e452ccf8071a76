"""Which layers get a LoRA adapter, and which settings hold where the model is an adapter folder?"""

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
"""Flag -> key of adapter_config.json."""
HEAD = "head_config.json"
"""File next to a classifier's adapter: labels and pad token, which the base model's configuration does not know."""
_PLAIN_NAME = re.compile(r"[\w.-]+")


def lora_targets(values: list[str]) -> list[str] | str:
    """Convert --lora_target_modules for peft: names of layers, one regular expression, or all-linear.

    Raises:
        UserError: empty text, not a regular expression, or all-linear together with other values.
    """
    # No value means all layers, while an empty text is a mistake, such as an unset shell variable.
    is_given = bool(values)
    if len(values) == 1 and values[0].lstrip().startswith("["):
        # Not JSON: a regular expression can begin with a character class.
        with contextlib.suppress(ValueError):
            values = [str(name) for name in json.loads(values[0])]
    names = [part.strip() for value in values for part in value.split(",") if part.strip()]
    if is_given and not names:
        raise UserError("DSR055", "--lora_target_modules is empty: give names of layers, or all-linear")
    if "all-linear" in names or not names:
        if len(names) > 1:
            raise UserError("DSR055", "--lora_target_modules: all-linear means all of them; give it alone")
        return "all-linear"
    if all(map(_PLAIN_NAME.fullmatch, names)):
        return names
    for value in values:
        try:
            re.compile(value)
        except re.error as error:
            raise UserError("DSR055", f"--lora_target_modules {value}: not a regular expression ({error})") from None
    # peft takes either a list of names or one pattern, so a mixture becomes one pattern; a name matches as in a list.
    patterns = [rf"(?:.*\.)?{re.escape(value)}" if _PLAIN_NAME.fullmatch(value) else f"(?:{value})" for value in values]
    return values[0] if len(values) == 1 else "|".join(patterns)


def adapter_folder(name: str | None) -> Path | None:
    """Folder of the adapter that a model's name refers to; None for a full model."""
    if not name:
        return None
    path = user_path(starter_path(name))
    # A folder that holds a model too is refused when it is loaded.
    is_adapter = (path / CONFIG).is_file() and not (path / "config.json").is_file()
    return path if is_adapter else None


def read_adapter(folder: Path) -> dict[str, Any]:
    """Read and check an adapter's own configuration.

    Raises:
        UserError: it is damaged, is not LoRA, has no safetensors, or does not name its base model.
    """
    where = f"--model_name_or_path {folder}"
    try:
        values = json.loads(read_text(folder / CONFIG))
        kind, base = values["peft_type"], values["base_model_name_or_path"]
        is_valid = type(values["r"]) is int and values["r"] >= 1 and isinstance(values["target_modules"], (list, str))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError("DSR056", f"{where}: {CONFIG} is damaged ({error})") from error
    if kind != "LORA":
        raise UserError("DSR057", f"{where}: this is a {kind} adapter; only LoRA adapters can be trained further")
    if not is_valid:
        expected = "r must be a whole number from 1, target_modules a list or a text"
        raise UserError("DSR056", f"{where}: {CONFIG} is damaged ({expected})")
    if not base or not isinstance(base, str):
        raise UserError(
            "DSR056", f"{where}: {CONFIG} does not name its base model (base_model_name_or_path): write its path there"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        # peft would load a pickle instead, or ask the hub.
        raise UserError("DSR056", f"{where}: adapter_model.safetensors is missing")
    return values


def head_settings(config: Any) -> dict[str, Any]:
    """The part of a model's configuration that a classifier's head needs."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    pad = config.get_text_config().pad_token_id
    return {"names": names, "problem_type": config.problem_type, "pad_token_id": pad}


def set_head(config: Any, settings: dict[str, Any]) -> None:
    """Copy another configuration's head_settings into this one."""
    names = [str(name) for name in settings["names"]]
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    config.problem_type = settings["problem_type"]
    config.get_text_config().pad_token_id = settings["pad_token_id"]


def read_head(folder: Path, config: Any) -> None:
    """Apply an adapter folder's HEAD, if it has one, to the base's configuration (UserError: it is damaged)."""
    if not (folder / HEAD).is_file():
        return
    try:
        set_head(config, json.loads(read_text(folder / HEAD)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError("DSR056", f"{folder / HEAD} is damaged ({error})") from error


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
        UserError: the user gave a value that contradicts the adapter.
    """
    folder = adapter_folder(str(merged.get("model_name_or_path", ("",))[0] or ""))
    if folder is None:
        return
    values, origin, overridden = read_adapter(folder), str(folder / CONFIG), []
    given = {key: value for key, value in merged.items() if key in by_user}
    _refuse_full_training(folder, given)
    for flag, key in _KEYS.items():
        setting = values.get(key, 0.0)
        # Dropout is not part of the weights, so the user may change it.
        if flag in given and (flag == "lora_dropout" or _same(given[flag][0], setting)):
            continue
        if flag in given:
            value, source = given[flag]
            raise UserError(
                "DSR058",
                f"--{flag} {_as_text(value)} ({source}), but the adapter {folder} has {_as_text(setting)}: drop the flag; "
                "training continues with the adapter as it is",
            )
        if flag in merged and not _same(merged[flag][0], setting):
            overridden.append(f"{flag} {_as_text(merged[flag][0])}")
        # The flag holds a list, in which a pattern is the only element.
        is_pattern = flag == "lora_target_modules" and not isinstance(setting, list)
        merged[flag] = ([setting] if is_pattern else setting, origin)
    instead = f"; its own settings override the recipe's {', '.join(overridden)}" if overridden else ""
    notes.append(f"training continues from the adapter {folder} of {values['base_model_name_or_path']}{instead}")


def _refuse_full_training(folder: Path, given: Merged) -> None:
    """Refuse flags that train all weights: an adapter folder does not hold them (UserError)."""
    if is_true(given.get("from_scratch", (False, ""))[0]):
        raise UserError(
            "DSR058", f"--from_scratch: {folder} is a LoRA adapter, which needs the weights of its base; drop the flag"
        )
    if str(given.get("lora_r", (1, ""))[0]) == "0":
        raise UserError(
            "DSR058",
            f"--lora_r 0 trains all weights, but {folder} is a LoRA adapter: merge it into its base first with "
            f"`dsrecipes export RUN --to DIR`, and give --model_name_or_path DIR",
        )


def _same(value: Any, setting: Any) -> bool:
    """Whether a value as it was written equals the adapter's setting."""
    try:
        if isinstance(setting, (list, str)):
            names = list(map(str, value)) if isinstance(value, (list, tuple)) else [str(value)]
            return _as_set(lora_targets(names)) == _as_set(setting)
        return float(value) == float(setting)
    except (TypeError, ValueError, UserError):
        return False


def _as_set(targets: list[str] | str) -> set[str]:
    return {targets} if isinstance(targets, str) else set(targets)


def _as_text(value: Any) -> str:
    return ",".join(sorted(map(str, value))) if isinstance(value, (list, tuple)) else str(value)
