"""The values of a run before types are checked: recipe, profile, --config and flags in layers, later ones winning.

Like find.py this imports neither torch nor transformers: `dsrecipes list` and `show` answer in under a second.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsrecipes.config.find import RecipeFiles, find_config, find_recipe, find_zero, is_shipped, recipe_names
from dsrecipes.config.flags import REMOVED, is_true
from dsrecipes.config.zero_values import contradiction, zero_values
from dsrecipes.errors import UserError, plural
from dsrecipes.io.text import read_yaml

PROFILES = ("auto", "full", "starter")
ABOUT_KEYS = ("about", "machine", "starter")
"""Keys of a YAML that are not flags: two lines for `dsrecipes list`, and the starter profile's values."""
BELONGS_TO = {
    "dataset": ("dataset_config", "eval_dataset", "columns", "skip_bad_rows", "class_weights", "problem_type"),
    "model_name_or_path": ("model_revision", "from_scratch", "prompt_style"),
    "bf16": ("fp16",),
    "fp16": ("bf16",),
    "global_batch_size": ("gradient_accumulation_steps",),
    "gradient_accumulation_steps": ("global_batch_size",),
}
"""Keys that depend on another: a new value of that one in a higher layer drops what lower layers said of them.

Values of a ZeRO JSON are not dropped: they hold, or the run is refused.
"""
LENGTHS = (("num_train_epochs", "max_steps"), ("max_steps", "num_train_epochs"))
"""Flag that sets the length of a run -> the other such flag, which a lower layer may set and which is dropped then."""
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Old names of transformers, which it reads only where the new name is not set."""
_YES, _NO = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "off", "0", "f", "n")
"""Words that turn a switch on and off."""


@dataclass(frozen=True)
class Layer:
    """Values from one place; `origin` is what `dsrecipes show` prints beside them."""

    origin: str
    values: Mapping[str, Any]
    default: bool = False
    """From a recipe, a profile or a shipped variant: gives way to whatever the user gives."""
    zero: bool = False
    """From a ZeRO JSON."""
    note: str = ""
    """What of it this machine cannot do."""


@dataclass(frozen=True)
class Layers:
    """What a run is asked for, before types are checked: later layers win, None removes a key."""

    recipe: RecipeFiles
    profile: str
    layers: tuple[Layer, ...]
    why_profile: str

    def merged(self) -> dict[str, tuple[Any, str]]:
        """key -> (value, origin) after layering."""
        result: dict[str, tuple[Any, str]] = {}
        for layer in self.layers:
            for owner, belongings in BELONGS_TO.items():
                if owner in layer.values and layer.values[owner] != result.get(owner, (None,))[0]:
                    result = {
                        key: (value, origin)
                        for key, (value, origin) in result.items()
                        if key not in belongings or origin == self.zero_json().origin
                    }
            for key, rival in LENGTHS:
                if str(layer.values.get(key, "-1")) not in ("-1", "None") and rival not in layer.values:
                    result.pop(rival, None)
            for key, value in layer.values.items():
                result.pop(key, None)
                if value is not None:
                    result[key] = (value, layer.origin)
        return result

    def is_on(self, key: str) -> bool:
        """Whether a true/false key is on; defaults are off."""
        return _is_on(list(self.layers), key)

    def first_line(self) -> str:
        """Which recipe and profile, and how to get the other one."""
        other = {
            "starter": " · the real model and data: --profile full",
            "full": " · a small offline one: --profile starter",
        }
        hint = "" if self.why_profile == "the only one" else other[self.profile]
        return f"recipe    {self.recipe.name} · profile {self.profile} ({self.why_profile}){hint}"

    def by_user(self) -> dict[str, str]:
        """Key -> origin of the values that the user gave: in a flag, a YAML, Python or a ZeRO JSON."""
        origins = {layer.origin for layer in self.layers if not layer.default}
        return {key: origin for key, (_, origin) in self.merged().items() if origin in origins}

    def zero_json(self) -> Layer:
        """The layer of the run's ZeRO JSON, empty where there is none, or where it leaves everything to the run."""
        return next((layer for layer in self.layers if layer.zero), Layer("", {}))

    def notes(self) -> list[str]:
        """What the run's ZeRO JSON changes of the defaults, and what of it this machine cannot do."""
        zero = self.zero_json()
        notes = [zero.note] if zero.note else []
        defaults = Layers(self.recipe, self.profile, tuple(layer for layer in self.layers if layer.default), "").merged()
        differing = {
            key: value for key, value in zero.values.items() if key in defaults and contradiction(defaults[key][0], value)
        }
        changes = [f"{key} {value} (not {defaults[key][0]})" for key, value in differing.items() if value is not None]
        unused = [key for key, value in differing.items() if value is None]
        if changes:
            notes.append(f"{zero.origin} sets {', '.join(changes)}")
        if unused:
            notes.append(
                f"{zero.origin} does not use {', '.join(unused)}: its optimizer and scheduler have values of their own"
            )
        return notes

    def removed(self) -> set[str]:
        """Keys that a lower layer sets and a higher one removes with null."""
        return {key for layer in self.layers for key in layer.values} - set(self.merged())


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under their one name: `no_packing` true is `packing` false, an old name is the new one."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        word = str(value).strip().lower()
        if key.startswith("no_") and key not in REMOVED and word in (*_YES, *_NO):
            key, value = key[3:], word in _NO
        if key == "optim_args" and isinstance(value, Mapping):
            value = ",".join(f"{name}={setting}" for name, setting in value.items())
        result[ALIASES.get(key, key)] = None if value == [] else value
    return result


def parse_flags(argv: Iterable[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key` and `--key a b` as a mapping of strings, `true` and lists.

    Types, choices and unknown keys are the business of the one parser in dsrecipes.config.schema.
    """
    flags: dict[str, Any] = {}
    key = None
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            name, has_value, value = token[2:].partition("=")
            key = name.replace("-", "_")
            flags[key] = [value] if has_value else []
            if has_value:
                key = None
        elif key is None:
            raise UserError(f"unexpected argument {token!r}: flags are written --name value")
        else:
            flags[key].append(token)
    return {name: values[0] if len(values) == 1 else values or "true" for name, values in flags.items()}


def accelerators() -> int:
    """Number of visible accelerators; asks torch where it is loaded, else the drivers (NVIDIA, AMD)."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return listed_accelerators()


def listed_accelerators() -> int:
    """Number of GPUs that the drivers list (NVIDIA, AMD), less those that a variable hides; torch may find fewer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
        count = len(re.findall(r"^GPU \d+:", listing, flags=re.MULTILINE))
        if re.search(r"^\s+MIG ", listing, flags=re.MULTILINE):
            count = 1  # CUDA gives a process one MIG instance, however many there are
    except (OSError, subprocess.TimeoutExpired):
        count = len([device for device in Path("/dev").glob("nvidia*") if device.name[6:].isdigit()])
    if not count and Path("/dev/kfd").exists() and os.environ.get("HIP_VISIBLE_DEVICES", "all").strip() not in ("", "-1"):
        count = len(list(Path("/dev/dri").glob("renderD*")))
    return min(count, len(visible.split(","))) if visible else count


def _profile(asked: str, has_starter: bool, use_cpu: bool) -> tuple[str, str]:
    if asked not in PROFILES:
        raise UserError(f"--profile {asked}: choose from {', '.join(PROFILES)}")
    if asked == "starter" and not has_starter:
        raise UserError("--profile starter: this recipe's YAML has no `starter:` section")
    if asked != "auto" or not has_starter:
        return ("full", "the only one") if not has_starter else (asked, "asked for")
    if use_cpu:
        return "starter", "--use_cpu"
    count = accelerators()
    return ("full", plural(count, "accelerator")) if count else ("starter", "no accelerator")


def _recipe(flag: Any, in_config: Any, config_path: Path | None) -> RecipeFiles:
    """The recipe that the flag or the --config YAML names; refused where they name two."""
    if not (flag or in_config):
        raise UserError(f"no recipe given: --recipe NAME. The recipes are: {', '.join(recipe_names())}")
    recipe = find_recipe(str(flag or in_config))
    if flag and in_config and str(flag) != str(in_config) and find_recipe(str(in_config)) != recipe:
        raise UserError(f"the recipe is {flag}, but {config_path} has `recipe: {in_config}`: drop one of them")
    return recipe


def _starter(values: Mapping[str, Any], path: Path | None) -> dict[str, Any] | None:
    """The starter section of a YAML."""
    starter = values.get("starter")
    if starter is not None and not isinstance(starter, dict):
        raise UserError(f"{path}: `starter:` must hold `key: value` lines")
    return starter


def layer(flags: Mapping[str, Any], origin: str = "flag") -> Layers:
    """Layer recipe YAML, profile, --config and flags into what the run is asked for.

    Args:
        flags: values by name, with `recipe`, `config` and `profile` among them.
        origin: what `show` calls the values in `flags`.

    Raises:
        UserError: no recipe, an unknown one, a bad file or profile.
    """
    flags = dict(flags)
    for key in ("recipe", "config", "profile"):
        if isinstance(flags.get(key), list):
            raise UserError(
                f"unexpected argument {flags[key][1]!r}: --{key} takes one value, and flags are written --name value"
            )
    flags.pop("local_rank", None)  # the deepspeed launcher appends it; the rank is read from the environment
    config_path = find_config(str(flags.pop("config"))) if flags.get("config") else None
    flags.pop("config", None)
    config = read_yaml(config_path) if config_path else {}
    recipe = _recipe(flags.pop("recipe", None), config.get("recipe"), config_path)
    base = read_yaml(recipe.yaml) if recipe.yaml else {}
    starters = (_starter(base, recipe.yaml), _starter(config, config_path))
    asked = str(flags.pop("profile", None) or config.get("profile") or base.get("profile") or "auto")
    use_cpu = is_true(flags.get("use_cpu", config.get("use_cpu", base.get("use_cpu", False))))
    profile, why = _profile(asked, starters != (None, None), use_cpu)

    def values(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return _named({key: value for key, value in mapping.items() if key not in (*ABOUT_KEYS, "recipe", "profile")})

    layers = [Layer("recipe", values(base), default=True)]
    if profile == "starter":
        layers.append(Layer("profile", values(starters[0] or {}), default=True))
    if config_path:
        layers.append(Layer(str(config_path), values(config), default=is_shipped(config_path)))
    if profile == "starter" and starters[1]:
        layers.append(Layer(f"{config_path}, starter", values(starters[1]), default=is_shipped(config_path)))
    layers.append(Layer(origin, _named(flags)))
    return Layers(recipe, profile, tuple(_with_zero_json(layers)), why)


def _with_zero_json(layers: list[Layer]) -> list[Layer]:
    """The layers with what the run's ZeRO JSON says, above the defaults and below what the user gives elsewhere.

    Raises:
        UserError: the user gives a value that contradicts the JSON's; both are shown with their origins.
    """
    name = next((layer.values["deepspeed"] for layer in reversed(layers) if "deepspeed" in layer.values), None)
    if isinstance(name, dict) or str(name).lstrip().startswith("{"):
        raise UserError("--deepspeed takes a name or a path: write the JSON into a file and give its path")
    path = find_zero(str(name or "none"))
    values = zero_values(path) if path else {}
    if not values:
        return layers
    given = [layer for layer in layers if not layer.default]
    clashes = [
        f"{key} is {_in_json(key, values)} in {path}, but {layer.values[key]} ({layer.origin})"
        for layer in given
        for key in values
        if layer.values.get(key) is not None and contradiction(layer.values[key], values[key])
    ]
    clashes += [
        f"{other} is on in {path}, but {mine} is on ({layer.origin})"
        for layer in given
        for mine, other in (("bf16", "fp16"), ("fp16", "bf16"))
        if values.get(other) is True and is_true(layer.values.get(mine))
    ]
    if clashes:
        raise UserError("; ".join(clashes) + '. Set the JSON\'s value to "auto", or drop the other one')
    note = ""
    if values.get("fp16") is True and (_is_on(layers, "use_cpu") or not accelerators()):
        values["fp16"], note = False, f"{path} asks for fp16, which needs a GPU: the CPU computes in fp32"
    return [*(layer for layer in layers if layer.default), Layer(str(path), values, zero=True, note=note), *given]


def _in_json(key: str, values: Mapping[str, Any]) -> str:
    """A value of a ZeRO JSON in words; None is a flag that its optimizer or scheduler does not take."""
    if values[key] is not None:
        return str(values[key])
    return f"not taken by {values['optim'] if key == 'optim_args' else values['lr_scheduler_type']}"


def _is_on(layers: list[Layer], key: str) -> bool:
    return is_true(next((layer.values[key] for layer in reversed(layers) if key in layer.values), False))


def seconds_of(text: str) -> float:
    """A duration such as 3h50m, 90m, 45s, 1d2h, 3:50:00, or a number of seconds.

    Raises:
        ValueError: it is none, or not above 0.
    """
    named = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    clock = re.fullmatch(r"(\d+):(\d\d):(\d\d)", text.strip())
    parts = named.groups("0") if named else ("0", *clock.groups()) if clock else ("0",) * 4
    seconds = sum(int(part) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True))
    if not seconds:
        raise ValueError(f"--time_limit {text}: give a duration such as 3h50m, 90m or 3:50:00")
    return float(seconds)
