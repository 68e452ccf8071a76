"""How are text, YAML and JSON files read, so that every error names file and line?"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from dsrecipes.errors import UserError

_MOST_NODES = 100_000
"""Limit for a YAML whose aliases are expanded; a few lines of aliases to aliases can stand for billions of nodes."""


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Count the nodes with every alias expanded; infinite where an alias contains itself.

    Args:
        sizes: id of a node -> its size, so that a node with many aliases is counted once.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # what an alias inside the node itself will read here
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[id(node)]


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader whose errors all have a line, and which refuses what PyYAML silently accepts.

    That is a repeated key, where the last value would win, and aliases that expand to more than memory holds.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        """Build the document (yaml.constructor.ConstructorError: its aliases expand to too much)."""
        if _size(node, {}) > _MOST_NODES:
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) stand for too much here", node.start_mark)
        _keep_text(node)
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value, and give errors of int(), datetime.date() and the like, which PyYAML passes on, a line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the mapping (yaml.constructor.ConstructorError: a key is repeated)."""
        # keys are compared as text, so that 1 and "1" count as a repetition
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
    """Keep the values of flags as the text that was written, since the parser of flags knows which of them are numbers.

    YAML would turn `eval_strategy: no` into false, `model_revision: 1.10` into 1.1 and `time_limit: 3:50:00` into 13800.
    """
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in ("starter", "<<") and isinstance(value, yaml.MappingNode):
            _keep_text(value)
        for scalar in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(scalar, yaml.ScalarNode) and scalar.tag.rpartition(":")[2] in ("bool", "int", "float"):
                scalar.tag = "tag:yaml.org,2002:str"


def read_text(path: Path) -> str:
    """Return the file's text, without a byte order mark (UserError: it cannot be read, or a byte is not UTF-8)."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise UserError("DSR003", f"{path}, line {line}: not UTF-8 (byte {byte:#04x}); save it as UTF-8") from None
    except OSError as error:
        raise UserError("DSR003", f"{path}: cannot be read ({error.strerror})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat YAML mapping: values as the text that was written, null as None, nested mappings typed.

    Raises:
        UserError: malformed (with the line), not a mapping, a repeated key, a key that is not text, or endless aliases.
    """
    try:
        values = yaml.load(read_text(path), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError("DSR004", f"{path}{where}: {problem}") from None
    except RecursionError:
        raise UserError("DSR004", f"{path}: nested too deeply") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError("DSR004", f"{path}: expected `key: value` lines at the top level")
    named = {key.replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        raise UserError("DSR004", f"{path}: a key is written twice, once with - and once with _")
    return named


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object (ValueError: a key is repeated)."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} is written twice")
        values[key] = value
    return values


def parse_json(text: str, where: str, unique_keys: bool = False) -> Any:
    """Parse a JSON value.

    Args:
        text: the JSON.
        where: what an error message begins with: a file, or a flag.
        unique_keys: refuse an object that has a key twice; Python would take the last value.

    Raises:
        UserError: the text is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError("DSR005", f"{where}{line}, column {error.colno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise UserError("DSR005", f"{where}: nested too deeply") from None
    except ValueError as error:  # a repeated key, or an integer of thousands of digits
        raise UserError("DSR005", f"{where}: not JSON that can be read ({error})") from None
