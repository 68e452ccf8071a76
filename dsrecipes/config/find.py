"""Find a recipe, a YAML or a ZeRO JSON by a short name or a path.

Nothing here imports torch or transformers: `dsrecipes list` and `show` answer in under a second.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from dsrecipes.errors import UserError, nearest
from dsrecipes.io.paths import user_path


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


def schema_path() -> Path:
    """The JSON schema of a recipe's YAML."""
    return _room("recipes") / "schema.json"


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
        path = user_path(name)
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
    path = user_path(name)
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


def is_shipped(path: Path) -> bool:
    """Whether a file is one of the shipped variants or ZeRO JSON files."""
    return path.parent.resolve() in (_room("recipes").resolve(), _room("ds_configs").resolve())


def find_zero(name: str) -> Path | None:
    """A ZeRO JSON by a short name or a path; None for `none`, and for what YAML calls false."""
    if name.lower() in ("none", "no", "off", "false"):
        return None
    path = user_path(name)
    if path.is_file():
        return path
    if name in zero_names():
        return _room("ds_configs") / f"{name}.json"
    raise UserError(
        f"--deepspeed {name}: no such file or name{nearest(name, zero_names())}. "
        f"The names are: {', '.join(zero_names())}, none; a JSON of your own goes by its path"
    )
