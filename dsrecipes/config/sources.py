"""The data sets that --dataset and --eval_dataset name: each a path or hub name, or a mapping with settings of its own.

--dataset chat.json '{"path": "org/name", "split": "test", "weight": 2}'

It imports neither torch nor transformers, like batch.py.
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

from dsrecipes.errors import nearest
from dsrecipes.io.text import parse_json

SPLITS = ("train", "validation", "test")
_OWN = ("prompt_style", "columns", "max_length", "dataset_config")
"""Keys of an entry that replace the flag of the same name for this source."""
_SHARES = ("rows", "weight")
_KEYS = ("path", "name", "split", *_SHARES, *_OWN)
Entry = str | dict[str, Any]
"""A source as the user gave it."""


@dataclass(frozen=True)
class Source:
    """One entry of --dataset or --eval_dataset, checked."""

    path: str
    name: str
    """In the header, in log.jsonl (eval_NAME_loss) and in the report."""
    split: str | None = None
    rows: int | None = None
    """Rows an epoch."""
    weight: float | None = None
    """Share of the rows that all sources without `rows` get together, relative to the other weights."""
    own: dict[str, Any] = field(default_factory=dict)
    """Settings that replace the run's: prompt_style, columns, max_length, dataset_config."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a path or hub name and nothing else."""
        return not self.own and self.split is None and self.rows is None and self.weight is None

    @property
    def share(self) -> str:
        """`rows 300` or `weight 2`; empty where neither was given."""
        return f"rows {self.rows}" if self.rows else f"weight {self.weight:g}" if self.weight else ""


def read_sources(flag: str, given: str | Sequence[Any]) -> tuple[list[Source], str | list[Entry]]:
    """Check the entries of a flag.

    Returns:
        The sources, and the flag's value in its shortest form: the path where there is one plain source, else the entries.

    Raises:
        ValueError: an entry is malformed, or two have one name; names the flag and the entry.
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
    if len(sources) == 1 and isinstance(entries[0], str):
        return sources, entries[0]
    return sources, entries


def paths_of(sources: Sequence[Source]) -> str:
    """The paths and hub names in one line."""
    return ", ".join(source.path for source in sources)


def _decoded(flag: str, value: Any) -> Any:
    """An entry of a command line that is written as JSON; a name that a file has is that file's."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")) or os.path.exists(value):
        return value
    return parse_json(value, f"--{flag} {value}", unique_keys=True)


def _checked(where: str, entry: Any, shares: bool) -> dict[str, Any]:
    """An entry as fields of Source; `name` is left out where it was not given."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected a path, a hub name or a mapping with `path`, found {entry!r}")
    values = {str(key): value for key, value in entry.items() if value is not None}
    for key in values:
        if key not in _KEYS:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, _KEYS)}; known are {', '.join(_KEYS)}")
    path = values.get("path")
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"{where}: `path` is missing: the file, folder or hub name of the data set")
    where = f"{where} ({path})"
    if not shares and any(key in values for key in _SHARES):
        raise ValueError(f"{where}: `rows` and `weight` are shares of the training rows; all validation rows are evaluated")
    if "rows" in values and "weight" in values:
        raise ValueError(f"{where}: give `rows` (rows an epoch) or `weight` (a share), not both")
    if values.get("split", "train") not in SPLITS:
        raise ValueError(f"{where}: split is {values['split']!r}: choose from {', '.join(SPLITS)}")
    for key, number in (("rows", int), ("max_length", int), ("weight", float)):
        if key in values:
            values[key] = _positive(where, key, values[key], number)
    for key in ("prompt_style", "dataset_config", "name"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"{where}: {key} is {values[key]!r}: expected text")
    fields = {key: values[key] for key in ("path", "name", "split", *_SHARES) if key in values}
    return fields | {"own": {key: values[key] for key in _OWN if key in values}}


def _positive(where: str, key: str, value: Any, kind: type) -> Any:
    kinds = {int: "a whole number above 0", float: "a number above 0"}
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not (number > 0 and math.isfinite(number) and (kind is float or number.is_integer())):
        raise ValueError(f"{where}: {key} is {value!r}: expected {kinds[kind]}")
    return kind(number)


def _names(flag: str, mappings: list[dict[str, Any]]) -> list[str]:
    """A name for each source, fit for a key of log.jsonl; longer ones where files of several folders are called the same."""
    given = [entry.pop("name", None) for entry in mappings]
    found = list(given)
    for depth in (1, 2, 3):
        short = [name or _short(entry["path"], depth) for name, entry in zip(given, mappings, strict=True)]
        counts = Counter(found)
        found = [now if name is None or counts[name] > 1 else name for name, now in zip(found, short, strict=True)]
    for name, count in Counter(found).items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"--{flag}: the name {name!r} of a source may hold letters, digits, `_`, `-` and `.` alone")
        if count > 1:
            raise ValueError(f"--{flag}: {count} sources have the name {name!r}: give each a `name` of its own")
    return found


def _short(path: str, depth: int) -> str:
    """The last parts of a path, suffixes of files left out."""
    parts = [part for part in PurePath(path.removeprefix("starter:")).parts if part not in ("/", "..", "~")]
    last = re.sub(r"\.(json|jsonl|csv|tsv|parquet|txt)(\.gz)?$", "", parts[-1], flags=re.IGNORECASE) if parts else path
    return re.sub(r"[^\w.-]+", "_", "_".join([*parts[:-1], last][-depth:]))
