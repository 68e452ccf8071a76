"""Find a recipe, a YAML or a ZeRO JSON by a short name or a path.

Nothing here imports torch or transformers: `dsrecipes list` and `show` answer in under a second.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from dsrecipes.errors import UserError, nearest

STARTER = "starter:"
"""Prefix of names that mean a file or folder bundled in dsrecipes/starter."""


def user_path(name: str | Path) -> Path:
    """A path as a user gave it, `~` resolved; nothing need be there.

    Raises:
        UserError: no file can have this name, or it may not be looked at.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{name}: cannot be opened ({error.strerror})") from None
    except (RuntimeError, ValueError) as error:  # ~name of nobody; a NUL, or what no file system can encode
        raise UserError(f"{str(name)!r}: not the name of a file or folder ({error})") from None
    return path


def flag_path(flag: str, name: str) -> Path:
    """The path that a flag gives; like user_path, with the flag in the message."""
    try:
        return user_path(name)
    except UserError as error:
        raise UserError(f"--{flag} {error}") from None


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


def starter_path(name: str) -> str:
    """`starter:data/prose.txt` as the path of the bundled file; any other name as it is."""
    if not name.startswith(STARTER):
        return name
    path = Path(__file__).parent / "starter" / name.removeprefix(STARTER)
    if not os.path.exists(path):  # false, too, for a name that no file can have
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


_MOST_NODES = 100_000
"""Of a YAML once its aliases are written out; a few lines of aliases to aliases can stand for billions."""


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """The number of nodes once every alias is written out; infinite where one holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_size(each, known) for each in inner))
    return known[id(node)]


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader whose errors all have a place, and which refuses what PyYAML takes in silence.

    These are a key written twice, where the last one would win, and aliases that write out to too much.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        """Build the document (yaml.constructor.ConstructorError: its aliases stand for too much)."""
        if _size(node, {}) > _MOST_NODES:
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) stand for too much here", node.start_mark)
        _keep_text(node)
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; PyYAML lets errors of int(), datetime.date() and the like through as they are."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            told = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the mapping; raises yaml.constructor.ConstructorError for a repeated key."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# In a nested mapping, such as lr_scheduler_kwargs, YAML 1.1 would read 1e-5 as text, 010 as 8 and 3:50:00 as 13800,
# which is never what is meant there.
_UniqueKeys.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (("int", r"[-+]?[0-9]+"), ("float", r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")):
    _UniqueKeys.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list("-+.0123456789"))
_UniqueKeys.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_UniqueKeys.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def _keep_text(node: yaml.Node) -> None:
    """Keep the values of flags as the text that was written: the parser of flags knows which of them are numbers.

    YAML would turn `eval_strategy: no` into false, `model_revision: 1.10` into 1.1 and `time_limit: 3:50:00` into 13800.
    """
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in ("starter", "<<") and isinstance(value, yaml.MappingNode):
            _keep_text(value)
        for scalar in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(scalar, yaml.ScalarNode) and scalar.tag.rpartition(":")[2] in ("bool", "int", "float"):
                scalar.tag = "tag:yaml.org,2002:str"


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
    """A flat YAML mapping: values as the text that was written, null as None, nested mappings typed.

    Raises:
        UserError: malformed (with the line), not a mapping, a key twice, a key that is not text, or aliases without end.
    """
    try:
        values = yaml.load(read_text(path), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: {getattr(error, 'problem', None) or str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected `key: value` lines at the top level")
    named = {key.replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        raise UserError(f"{path}: a key is written twice, once with - and once with _")
    return named


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} is written twice")
        values[key] = value
    return values


def parse_json(text: str, where: str, unique_keys: bool = False) -> Any:
    """A JSON value.

    Args:
        where: the beginning of the message of an error.
        unique_keys: refuse an object that has a key twice; Python would take the last value.

    Raises:
        UserError: the text is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{where}{line}, column {error.colno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{where}: not JSON that can be read ({error})") from None
