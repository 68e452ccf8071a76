"""Find a recipe, a YAML or a ZeRO JSON by a short name or a path, and layer the values of a run.

Nothing here imports torch or transformers: `dsrecipes list` and `show` answer in under a second.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from dsrecipes.errors import UserError, nearest

PROFILES = ("auto", "full", "starter")
ABOUT_KEYS = ("about", "machine", "starter")
"""Keys of a recipe's YAML that are not flags: two lines for `dsrecipes list`, and the starter profile's values."""
BELONGS_TO = {
    "dataset": ("dataset_config", "eval_dataset", "skip_bad_rows"),
    "model_name_or_path": ("model_revision", "from_scratch", "prompt_style"),
    "bf16": ("fp16",),
    "fp16": ("bf16",),
}
"""Keys that depend on another: a new value of that one in a higher layer drops what lower layers said of them."""
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Old names of transformers, which it reads only where the new name is not set."""
STARTER = "starter:"
"""Prefix of names that mean a file or folder bundled in dsrecipes/starter."""


def _room(name: str) -> Path:
    spec = importlib.util.find_spec(f"dsrecipes.{name}")
    assert spec is not None and spec.submodule_search_locations, f"{name}/ is missing from the installation"
    return Path(next(iter(spec.submodule_search_locations)))


def recipe_names() -> list[str]:
    """The shipped recipes: every X.py of recipes/ that has its X.yaml."""
    return sorted(path.stem for path in _room("recipes").glob("*.py") if path.with_suffix(".yaml").is_file())


def variant_names() -> list[str]:
    """The shipped variant YAMLs: a recipe's changed lines for another model or machine."""
    return sorted(path.stem for path in _room("recipes").glob("*.yaml") if not path.with_suffix(".py").is_file())


def zero_names() -> list[str]:
    """The shipped ZeRO JSON files, by stem."""
    return sorted(path.stem for path in _room("ds_configs").glob("*.json"))


def starter_path(name: str) -> str:
    """`starter:data/prose.txt` as the path of the bundled file; any other name as it is."""
    if not name.startswith(STARTER):
        return name
    path = Path(__file__).parent / "starter" / name.removeprefix(STARTER)
    if not path.exists():
        raise UserError(f"{name}: no such bundled file or folder ({path})")
    return str(path)


@dataclass(frozen=True)
class RecipeFiles:
    """Where a recipe is: its module (a dotted name or a .py file) and its YAML, if it has one."""

    name: str
    module: str | Path
    yaml: Path | None

    def load(self) -> ModuleType:
        """Import the recipe's module."""
        if isinstance(self.module, str):
            return importlib.import_module(self.module)
        name = f"dsrecipes_user_{self.name}"  # random.py must not become the module `random`
        spec = importlib.util.spec_from_file_location(name, self.module)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module


def find_recipe(name: str) -> RecipeFiles:
    """A shipped recipe's name, a .py file, or an importable module.

    Raises:
        UserError: none of these; the message lists the shipped recipes.
    """
    if name in recipe_names():
        return RecipeFiles(name, f"dsrecipes.recipes.{name}", _room("recipes") / f"{name}.yaml")
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"--recipe {name}: no such file")
        beside = path.with_suffix(".yaml")
        return RecipeFiles(path.stem, path.resolve(), beside if beside.is_file() else None)
    if "." in name:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is not None and spec.origin:
            beside = Path(spec.origin).with_suffix(".yaml")
            return RecipeFiles(name.rsplit(".", 1)[-1], name, beside if beside.is_file() else None)
    known = recipe_names()
    raise UserError(
        f"unknown recipe {name!r}{nearest(name, known)}. The recipes are: {', '.join(known)}; "
        "a recipe of your own is a path/to/mine.py or an importable module.name"
    )


def find_config(name: str) -> Path:
    """A YAML by path, or a shipped variant by name."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    if name in variant_names():
        return _room("recipes") / f"{name}.yaml"
    raise UserError(
        f"--config {name}: no such file{nearest(name, variant_names())}. "
        f"The shipped variants are: {', '.join(variant_names())}"
    )


def find_zero(name: str) -> Path | None:
    """A ZeRO JSON by a short name or a path; None for `none`."""
    if name == "none":
        return None
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in zero_names():
        return _room("ds_configs") / f"{name}.json"
    raise UserError(
        f"--deepspeed {name}: no such file or name{nearest(name, zero_names())}. "
        f"The names are: {', '.join(zero_names())}, none; a JSON of your own goes by its path"
    )


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which PyYAML lets the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the mapping; raises yaml.constructor.ConstructorError for a repeated key."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_text(path: Path) -> str:
    """The file's text; a UserError names the byte that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A flat YAML mapping.

    Raises:
        UserError: malformed (with the line), not a mapping, a key twice, or a key that is not text.
    """
    try:
        values = yaml.load(read_text(path), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: {getattr(error, 'problem', None) or str(error).splitlines()[0]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected `key: value` lines at the top level")
    return {key.replace("-", "_"): value for key, value in values.items()}


@dataclass(frozen=True)
class Layer:
    """Values from one place; `origin` is what `dsrecipes show` prints beside them."""

    origin: str
    values: Mapping[str, Any]


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
                    result = {key: each for key, each in result.items() if key not in belongings}
            for key, value in layer.values.items():
                result.pop(key, None)
                if value is not None:
                    result[key] = (value, layer.origin)
        return result

    def is_on(self, key: str) -> bool:
        """Whether a true/false key is on; defaults are off."""
        return str(self.merged().get(key, (False, ""))[0]).lower() in ("true", "1", "yes")

    def first_line(self) -> str:
        """Which recipe and profile, and how to get the other one."""
        other = {
            "starter": " · the real model and data: --profile full",
            "full": " · a small offline one: --profile starter",
        }
        hint = "" if self.why_profile == "the only one" else other[self.profile]
        return f"recipe    {self.recipe.name} · profile {self.profile} ({self.why_profile}){hint}"

    def removed(self) -> set[str]:
        """Keys that a lower layer sets and a higher one removes with null."""
        return {key for layer in self.layers for key in layer.values} - set(self.merged())


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under their one name: `no_packing` true is `packing` false, an old name is the new one."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("no_") and str(value).lower() in ("true", "false"):
            key, value = key[3:], str(value).lower() == "false"
        result[ALIASES.get(key, key)] = None if value == [] else value
    return result


def parse_flags(argv: Iterable[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key` and `--key a b` as a mapping of strings, `true` and lists.

    Types, choices and unknown keys are the business of the one parser in dsrecipes.config.
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
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
        count = len(re.findall(r"^GPU \d+:", listing, flags=re.MULTILINE))
    except (OSError, subprocess.TimeoutExpired):
        count = len([device for device in Path("/dev").glob("nvidia*") if device.name[6:].isdigit()])
    if not count and Path("/dev/kfd").exists():
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
    return ("full", f"{count} accelerator{'s' * (count > 1)}") if count else ("starter", "no accelerator")


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
    name = flags.pop("recipe", None) or config.get("recipe")
    if not name:
        raise UserError(f"no recipe given: --recipe NAME. The recipes are: {', '.join(recipe_names())}")
    recipe = find_recipe(str(name))
    base = read_yaml(recipe.yaml) if recipe.yaml else {}
    starter = base.get("starter")
    if starter is not None and not isinstance(starter, dict):
        raise UserError(f"{recipe.yaml}: `starter:` must hold `key: value` lines")
    asked = str(flags.pop("profile", None) or config.get("profile") or base.get("profile") or "auto")
    use_cpu = str(flags.get("use_cpu", config.get("use_cpu", base.get("use_cpu", "false")))).lower() in ("true", "1", "yes")
    profile, why = _profile(asked, starter is not None, use_cpu)

    def values(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return _named({key: value for key, value in mapping.items() if key not in (*ABOUT_KEYS, "recipe", "profile")})

    layers = [Layer("recipe", values(base))]
    if profile == "starter":
        layers.append(Layer("profile", values(starter or {})))
    if config_path:
        layers.append(Layer(str(config_path), values(config)))
    layers.append(Layer(origin, _named(flags)))
    return Layers(recipe, profile, tuple(layers), why)
