"""Read text, YAML and JSON files, with errors that name the place."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from dsrecipes.errors import UserError

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
