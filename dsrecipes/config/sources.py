"""Which data sets do --dataset and --eval_dataset name? A path, a hub name, or a mapping with settings of its own each.

--dataset chat.json '{"path": "org/name", "split": "test", "weight": 2}'
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from dsrecipes.errors import UserError, nearest
from dsrecipes.io.text import parse_json

SPLITS = ("train", "validation", "test")
_OWN = ("prompt_style", "columns", "max_length", "dataset_config")
"""Keys of an entry that override the flag of the same name for this source."""
_SHARES = ("rows", "weight")
_NUMBERS = {"rows": int, "max_length": int, "weight": float}
_KEYS = ("path", "name", "split", *_SHARES, *_OWN)
Entry = str | dict[str, Any]
"""A source as the user gave it."""


@dataclass(frozen=True)
class Source:
    """One entry of --dataset or --eval_dataset, checked."""

    path: str
    name: str
    """Its name in the header, in log.jsonl (eval_NAME_loss) and in the report."""
    split: str | None = None
    rows: int | None = None
    """Rows per epoch."""
    weight: float | None = None
    """Share, relative to the other weights, of the rows that the sources without `rows` get together."""
    own: dict[str, Any] = field(default_factory=dict)
    """Settings that override the run's: prompt_style, columns, max_length, dataset_config."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a path or hub name and nothing else."""
        return not self.own and self.split is None and self.rows is None and self.weight is None

    @property
    def share(self) -> str:
        """`rows 300` or `weight 2`; empty where neither was given."""
        if self.rows:
            return f"rows {self.rows}"
        return f"weight {self.weight:g}" if self.weight else ""


def read_sources(flag: str, given: str | Sequence[Any]) -> tuple[list[Source], str | list[Entry]]:
    """Parse the entries of a flag.

    Returns:
        The sources, and the flag's value in its shortest form: the path where there is one plain source, else the entries.

    Raises:
        UserError: an entry is malformed, or two have one name; names the flag and the entry.
    """
    entries: list[Any] = []
    for value in [given] if isinstance(given, (str, Mapping)) else given:
        decoded = _decoded(flag, value)
        entries += decoded if isinstance(decoded, list) else [decoded]
    mappings = [
        _checked(f"--{flag}, entry {number}" if len(entries) > 1 else f"--{flag}", entry, shares=flag == "dataset")
        for number, entry in enumerate(entries, 1)
    ]
    sources = [Source(name=name, **entry) for name, entry in zip(_names(flag, mappings), mappings, strict=True)]
    # config.yaml then shows the path as the user wrote it.
    if len(sources) == 1 and isinstance(entries[0], str):
        return sources, entries[0]
    return sources, entries


def paths_of(sources: Sequence[Source]) -> str:
    """The paths and hub names in one line."""
    return ", ".join(source.path for source in sources)


def _decoded(flag: str, value: Any) -> Any:
    """The value of an entry that is written as JSON on a command line; the name of an existing file stays as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")) or os.path.exists(value):
        return value
    return parse_json(value, f"--{flag} {value}", unique_keys=True)


def _checked(where: str, entry: Any, shares: bool) -> dict[str, Any]:
    """An entry as fields of Source; `name` is left out where it was not given."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        raise UserError("DSR060", f"{where}: expected a path, a hub name or a mapping with `path`, found {entry!r}")
    # null removes a key, as everywhere in a YAML.
    values = {str(key): value for key, value in entry.items() if value is not None}
    path = values.get("path")
    for key in values:
        if key not in _KEYS:
            hint = nearest(key, _KEYS)
            raise UserError("DSR060", f"{where}: unknown key {key!r}{hint}; known are {', '.join(_KEYS)}")
    if not isinstance(path, str) or not path.strip():
        raise UserError("DSR060", f"{where}: `path` is missing: the file, folder or hub name of the data set")
    problem = _problem(values, shares)
    if problem:
        raise UserError("DSR060", f"{where} ({path}): {problem}")
    for key, kind in _NUMBERS.items():
        if key in values:
            # Through float, because `1e3` is a whole number too.
            values[key] = kind(float(values[key]))
    fields = {key: values[key] for key in ("path", "name", "split", *_SHARES) if key in values}
    return fields | {"own": {key: values[key] for key in _OWN if key in values}}


def _problem(values: Mapping[str, Any], shares: bool) -> str | None:
    """What is wrong with the settings of an entry; None where nothing is."""
    if not shares and any(key in values for key in _SHARES):
        return "`rows` and `weight` are shares of the training rows; all validation rows are evaluated"
    if "rows" in values and "weight" in values:
        return "give `rows` (rows an epoch) or `weight` (a share), not both"
    if values.get("split", "train") not in SPLITS:
        return f"split is {values['split']!r}: choose from {', '.join(SPLITS)}"
    for key, kind in _NUMBERS.items():
        if key in values and not _is_positive(values[key], kind):
            expected = "a whole number above 0" if kind is int else "a number above 0"
            return f"{key} is {values[key]!r}: expected {expected}"
    for key in ("prompt_style", "dataset_config", "name"):
        if not isinstance(values.get(key, ""), str):
            return f"{key} is {values[key]!r}: expected text"
    return None


def _is_positive(value: Any, kind: type) -> bool:
    """Whether a value, a number or its text, is a finite number above 0 of this kind; true is not 1."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return False
    return number > 0 and math.isfinite(number) and (kind is float or number.is_integer())


def _names(flag: str, mappings: list[dict[str, Any]]) -> list[str]:
    """A name for each source that can be a key of log.jsonl, with parent folders where two files have the same name."""
    given = [entry.pop("name", None) for entry in mappings]
    names = list(given)
    # Only names that clash get longer, so the curves of the other data sets keep their names.
    for depth in (1, 2, 3):
        candidates = [name or _short(entry["path"], depth) for name, entry in zip(given, mappings, strict=True)]
        counts = Counter(names)
        names = [
            candidate if name is None or counts[name] > 1 else name
            for name, candidate in zip(names, candidates, strict=True)
        ]
    for name, count in Counter(names).items():
        if not re.fullmatch(r"[\w.-]+", name):
            allowed = "letters, digits, `_`, `-` and `.`"
            raise UserError("DSR061", f"--{flag}: the name {name!r} of a source may hold only {allowed}")
        if count > 1:
            raise UserError("DSR061", f"--{flag}: {count} sources have the name {name!r}: give each a `name` of its own")
    return names


def _short(path: str, depth: int) -> str:
    """The last `depth` parts of a path, without file suffixes."""
    parts = [part for part in PurePath(path.removeprefix("starter:")).parts if part not in ("/", "..", "~")]
    last = re.sub(r"\.(json|jsonl|csv|tsv|parquet|txt)(\.gz)?$", "", parts[-1], flags=re.IGNORECASE) if parts else path
    return re.sub(r"[^\w.-]+", "_", "_".join([*parts[:-1], last][-depth:]))
