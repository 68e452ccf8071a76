"""Which value wins: recipe, profile, --config or flag? Layers of values before types are checked; later ones win.

Like find.py this imports neither torch nor transformers, so that `dsrecipes list` and `show` answer in under a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsrecipes.config.find import RecipeFiles, find_config, find_recipe, find_zero, is_shipped, recipe_names
from dsrecipes.config.flags import REMOVED, Merged, is_true
from dsrecipes.config.zero_values import contradiction, zero_values
from dsrecipes.errors import UserError, coded, plural
from dsrecipes.io.devices import accelerators
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
"""Key -> keys that make sense only with its value: a higher layer that changes it drops the lower layers' values of them."""
LENGTHS = (("num_train_epochs", "max_steps"), ("max_steps", "num_train_epochs"))
"""Flag that sets the length of a run -> the other such flag, which is dropped where a lower layer sets it."""
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Old name in transformers -> new name; transformers reads the old one only where the new one is not set."""
_YES = ("true", "yes", "on", "1", "t", "y")
_NO = ("false", "no", "off", "0", "f", "n")
"""Words that turn a switch on and off."""


@dataclass(frozen=True)
class Layer:
    """Values from one origin, which `dsrecipes show` prints next to them."""

    origin: str
    values: Mapping[str, Any]
    default: bool = False
    """From a recipe, a profile or a shipped variant: any value of the user's overrides it."""
    zero: bool = False
    """From a ZeRO JSON."""
    note: str = ""
    """What this machine cannot do of it, with an id."""


@dataclass(frozen=True)
class Layers:
    """The requested values of a run before types are checked: later layers win, None removes a key."""

    recipe: RecipeFiles
    profile: str
    layers: tuple[Layer, ...]
    why_profile: str

    def merged(self) -> Merged:
        """Key -> (value, origin) after layering."""
        result: Merged = {}
        for layer in self.layers:
            self._drop_dependents(result, layer)
            for key, rival in LENGTHS:
                # transformers writes -1 for a max_steps that is not given.
                sets_length = str(layer.values.get(key, "-1")) not in ("-1", "None")
                if sets_length and rival not in layer.values:
                    result.pop(rival, None)
            for key, value in layer.values.items():
                result.pop(key, None)  # so that keys appear in the order of the layers that decide them
                if value is not None:
                    result[key] = (value, layer.origin)
        return result

    def _drop_dependents(self, merged: Merged, layer: Layer) -> None:
        """Remove the values that belonged to what this layer changes: another data set has other columns."""
        for owner, dependents in BELONGS_TO.items():
            if owner not in layer.values or layer.values[owner] == merged.get(owner, (None,))[0]:
                continue
            for key in dependents:
                # Values of a ZeRO JSON are not dropped: they apply, or the run is refused.
                if key in merged and merged[key][1] != self.zero_json().origin:
                    del merged[key]

    def is_on(self, key: str) -> bool:
        """Whether a switch is on; one that no layer sets is off."""
        return _is_on(list(self.layers), key)

    def first_line(self) -> str:
        """The header's line on recipe and profile, with the flag that selects the other profile."""
        other = {"starter": "the real model and data: --profile full", "full": "a small offline one: --profile starter"}
        hint = "" if self.why_profile == "the only one" else f" · {other[self.profile]}"
        return f"recipe    {self.recipe.name} · profile {self.profile} ({self.why_profile}){hint}"

    def by_user(self) -> dict[str, str]:
        """Key -> origin of the values that the user gave by flag, YAML, Python or ZeRO JSON."""
        origins = {layer.origin for layer in self.layers if not layer.default}
        return {key: origin for key, (_, origin) in self.merged().items() if origin in origins}

    def zero_json(self) -> Layer:
        """The layer of the run's ZeRO JSON; empty where there is no JSON, or where it leaves every value open."""
        return next((layer for layer in self.layers if layer.zero), Layer("", {}))

    def notes(self) -> list[str]:
        """What the run's ZeRO JSON changes of the defaults, and what this machine cannot do of it."""
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
            keys = ", ".join(unused)
            reason = "its optimizer and scheduler have values of their own"
            notes.append(coded("DSR066", f"{zero.origin} does not use {keys}: {reason}"))
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
    """`--key value`, `--key=value`, `--key` and `--key a b` as a mapping to text, `true` and lists.

    Types, choices and unknown keys are left to the one parser in dsrecipes.config.parse.

    Raises:
        UserError: a word that no flag precedes.
    """
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            flags[name.replace("-", "_")] = values = [value] if has_value else []
            if has_value:
                values = None
        elif values is None:
            raise UserError("DSR033", f"unexpected argument {word!r}: flags are written --name value")
        else:
            values.append(word)
    return {name: values[0] if len(values) == 1 else values or "true" for name, values in flags.items()}


def _profile(requested: str, has_starter: bool, use_cpu: bool) -> tuple[str, str]:
    """The profile that runs, and why."""
    if requested not in PROFILES:
        raise UserError("DSR034", f"--profile {requested}: choose from {', '.join(PROFILES)}")
    if requested == "starter" and not has_starter:
        raise UserError("DSR034", "--profile starter: this recipe's YAML has no `starter:` section")
    if not has_starter:
        return "full", "the only one"
    if requested != "auto":
        return requested, "asked for"
    if use_cpu:
        return "starter", "--use_cpu"
    count = accelerators()
    return ("full", plural(count, "accelerator")) if count else ("starter", "no accelerator")


def _recipe(flag: Any, in_config: Any, config_path: Path | None) -> RecipeFiles:
    """The recipe that the flag or the --config YAML names (UserError: neither does, or they name two)."""
    if not (flag or in_config):
        raise UserError("DSR035", f"no recipe given: --recipe NAME. The recipes are: {', '.join(recipe_names())}")
    recipe = find_recipe(str(flag or in_config))
    if flag and in_config and str(flag) != str(in_config) and find_recipe(str(in_config)) != recipe:
        raise UserError("DSR036", f"the recipe is {flag}, but {config_path} has `recipe: {in_config}`: drop one of them")
    return recipe


def _starter(values: Mapping[str, Any], path: Path | None) -> dict[str, Any] | None:
    """The starter section of a YAML."""
    starter = values.get("starter")
    if starter is not None and not isinstance(starter, dict):
        raise UserError("DSR037", f"{path}: `starter:` must hold `key: value` lines")
    return starter


def layer(flags: Mapping[str, Any], origin: str = "flag") -> Layers:
    """Layer recipe YAML, profile, --config and flags into the requested values of a run.

    Args:
        flags: values by name, with `recipe`, `config` and `profile` among them.
        origin: what `show` calls the values in `flags`.

    Raises:
        UserError: no recipe, an unknown one, a bad file or profile.
    """
    flags = dict(flags)
    for key in ("recipe", "config", "profile"):
        if isinstance(flags.get(key), list):
            extra = flags[key][1]
            raise UserError(
                "DSR033", f"unexpected argument {extra!r}: --{key} takes one value, and flags are written --name value"
            )
    flags.pop("local_rank", None)  # the deepspeed launcher appends it; the rank is read from the environment
    config_name = flags.pop("config", None)
    config_path = find_config(str(config_name)) if config_name else None
    config = read_yaml(config_path) if config_path else {}
    recipe = _recipe(flags.pop("recipe", None), config.get("recipe"), config_path)
    base = read_yaml(recipe.yaml) if recipe.yaml else {}
    starters = (_starter(base, recipe.yaml), _starter(config, config_path))
    requested = str(flags.pop("profile", None) or config.get("profile") or base.get("profile") or "auto")
    # Read before layering, because it decides the profile, which is a layer.
    use_cpu = is_true(flags.get("use_cpu", config.get("use_cpu", base.get("use_cpu", False))))
    profile, why = _profile(requested, starters != (None, None), use_cpu)
    is_starter = profile == "starter"

    layers = [Layer("recipe", _flag_values(base), default=True)]
    if is_starter:
        layers.append(Layer("profile", _flag_values(starters[0] or {}), default=True))
    if config_path:
        shipped = is_shipped(config_path)
        layers.append(Layer(str(config_path), _flag_values(config), default=shipped))
        if is_starter and starters[1]:
            layers.append(Layer(f"{config_path}, starter", _flag_values(starters[1]), default=shipped))
    layers.append(Layer(origin, _named(flags)))
    return Layers(recipe, profile, tuple(_with_zero_json(layers)), why)


def _flag_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a YAML that are flags."""
    return _named({key: value for key, value in values.items() if key not in (*ABOUT_KEYS, "recipe", "profile")})


def _with_zero_json(layers: list[Layer]) -> list[Layer]:
    """The layers with the values of the run's ZeRO JSON, above the defaults and below what the user gives elsewhere.

    Raises:
        UserError: the user gives a value that contradicts the JSON's; both are shown with their origins.
    """
    name = next((layer.values["deepspeed"] for layer in reversed(layers) if "deepspeed" in layer.values), None)
    if isinstance(name, dict) or str(name).lstrip().startswith("{"):
        raise UserError("DSR038", "--deepspeed takes a name or a path: write the JSON into a file and give its path")
    path = find_zero(str(name or "none"))
    values = zero_values(path) if path else {}
    if not values:
        return layers
    given = [layer for layer in layers if not layer.default]
    _refuse_contradictions(given, values, path)
    note = ""
    if values.get("fp16") is True and (_is_on(layers, "use_cpu") or not accelerators()):
        values["fp16"] = False
        note = coded("DSR066", f"{path} asks for fp16, which needs a GPU: the CPU computes in fp32")
    return [*(layer for layer in layers if layer.default), Layer(str(path), values, zero=True, note=note), *given]


def _refuse_contradictions(given: list[Layer], values: Mapping[str, Any], path: Path | None) -> None:
    """Refuse values of the user's that differ from those in a ZeRO JSON (UserError)."""
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
        raise UserError("DSR039", "; ".join(clashes) + '. Set the JSON\'s value to "auto", or drop the other one')


def _in_json(key: str, values: Mapping[str, Any]) -> str:
    """A value of a ZeRO JSON for a message; None is a flag that its optimizer or scheduler does not take."""
    if values[key] is not None:
        return str(values[key])
    return f"not taken by {values['optim'] if key == 'optim_args' else values['lr_scheduler_type']}"


def _is_on(layers: list[Layer], key: str) -> bool:
    return is_true(next((layer.values[key] for layer in reversed(layers) if key in layer.values), False))
