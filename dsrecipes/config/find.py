"""Which file does a name mean? Recipes, YAML and ZeRO JSON by a short name or a path.

Imports neither torch nor transformers, so that `dsrecipes list` and `show` answer in under a second.
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


def _shipped_folder(name: str) -> Path:
    """recipes/ or ds_configs/: at the top of a checkout, inside the package where it is installed."""
    spec = importlib.util.find_spec(f"dsrecipes.{name}")
    assert spec is not None and spec.submodule_search_locations, f"{name}/ is missing from the installation"
    return Path(next(iter(spec.submodule_search_locations)))


def recipe_names() -> list[str]:
    """The shipped recipes: every X.py in recipes/ that has an X.yaml."""
    return sorted(path.stem for path in _shipped_folder("recipes").glob("*.py") if path.with_suffix(".yaml").is_file())


def variant_names() -> list[str]:
    """The shipped variants: YAML files with the lines that another model or machine changes of a recipe."""
    return sorted(path.stem for path in _shipped_folder("recipes").glob("*.yaml") if not path.with_suffix(".py").is_file())


def zero_names() -> list[str]:
    """The shipped ZeRO JSON files, by stem."""
    return sorted(path.stem for path in _shipped_folder("ds_configs").glob("*.json"))


def schema_path() -> Path:
    """The JSON schema of a recipe's YAML."""
    return _shipped_folder("recipes") / "schema.json"


@dataclass(frozen=True)
class RecipeFiles:
    """The files of a recipe: its module (a dotted name or a .py file) and its YAML, if it has one."""

    name: str
    module: str | Path
    yaml: Path | None

    def load(self) -> ModuleType:
        """Import the recipe's module."""
        if isinstance(self.module, str):
            return importlib.import_module(self.module)
        # A prefix, so that a recipe in random.py does not become the module `random`.
        name = f"dsrecipes_user_{self.name}"
        spec = importlib.util.spec_from_file_location(name, self.module)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module


def find_recipe(name: str) -> RecipeFiles:
    """Find a recipe by its shipped name, a .py file, or an importable module.

    Raises:
        UserError: none of these; the message lists the shipped recipes.
    """
    if name in recipe_names():
        return RecipeFiles(name, f"dsrecipes.recipes.{name}", _shipped_folder("recipes") / f"{name}.yaml")
    if name.endswith(".py"):
        path = user_path(name)
        if not path.is_file():
            raise UserError("DSR030", f"--recipe {name}: no such file")
        return RecipeFiles(path.stem, path.resolve(), _yaml_of(path))
    if "." in name:
        try:
            spec = importlib.util.find_spec(name)
        # find_spec imports the parent package, which may not exist, and refuses names such as `a..b`.
        except (ImportError, ValueError):
            spec = None
        if spec is not None and spec.origin:
            return RecipeFiles(name.rsplit(".", 1)[-1], name, _yaml_of(Path(spec.origin)))
    known = recipe_names()
    raise UserError(
        "DSR030",
        f"unknown recipe {name!r}{nearest(name, known)}. The recipes are: {', '.join(known)}; "
        "a recipe of your own is a path/to/mine.py or an importable module.name",
    )


def _yaml_of(module: Path) -> Path | None:
    """The YAML of the same name, if there is one."""
    path = module.with_suffix(".yaml")
    return path if path.is_file() else None


def find_config(name: str) -> Path:
    """Find a YAML by path, by run folder, or by the name of a shipped variant (UserError: none of these)."""
    path = user_path(name)
    # A run folder means the configuration that it recorded: the same run again.
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    # After the path, so that a file of the user's hides a shipped variant of the same name.
    if name in variant_names():
        return _shipped_folder("recipes") / f"{name}.yaml"
    raise UserError(
        "DSR031",
        f"--config {name}: no such file{nearest(name, variant_names())}. "
        f"The shipped variants are: {', '.join(variant_names())}",
    )


def is_shipped(path: Path) -> bool:
    """Whether a file is one of the shipped variants or ZeRO JSON files."""
    return path.parent.resolve() in (_shipped_folder("recipes").resolve(), _shipped_folder("ds_configs").resolve())


def find_zero(name: str) -> Path | None:
    """Find a ZeRO JSON by a short name or a path; None for `none` and for what YAML calls false (UserError: no such file)."""
    # YAML reads `deepspeed: no` as false.
    if name.lower() in ("none", "no", "off", "false"):
        return None
    path = user_path(name)
    if path.is_file():
        return path
    if name in zero_names():
        return _shipped_folder("ds_configs") / f"{name}.json"
    raise UserError(
        "DSR032",
        f"--deepspeed {name}: no such file or name{nearest(name, zero_names())}. "
        f"The names are: {', '.join(zero_names())}, none; for a JSON of your own give its path",
    )
