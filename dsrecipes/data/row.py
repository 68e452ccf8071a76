"""What is a row, and where does it come from? Rows with their places, whatever holds them.

A place (`FILE, line 7`) is carried from the file to the message, so that a fault found late can still be fixed in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A row of a file: its fields by column."""


@dataclass(frozen=True)
class LocatedRows:
    """Rows in memory that keep their places."""

    rows: list[tuple[str, Row]]
    """(place, row)."""

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.rows)

    def located(self) -> Iterator[tuple[str, Row]]:
        """Return rows with their places."""
        return iter(self.rows)


def located(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of any rows: a datasets.Dataset, a list, or rows that know their places."""
    if hasattr(rows, "located"):
        yield from rows.located()
    else:
        is_arrow = hasattr(rows, "features")
        for number, row in enumerate(rows, 1):
            yield f"row {number}", without_nulls(row) if is_arrow else row


def without_nulls(row: Row) -> Row:
    """Remove null fields from the objects inside a row.

    In an Arrow column every object has the keys of all objects of the column, with null for those that it did not have.
    """
    return {name: _pruned(value) if isinstance(value, (list, dict)) else value for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def fingerprint(rows: Iterable[Row]) -> str:
    """Hash the content of rows; costs little where the source already has a hash (files, a datasets.Dataset)."""
    # the hash of a datasets.Dataset covers its files and transforms, so its rows need not be read
    own = getattr(rows, "fingerprint", None) or getattr(rows, "_fingerprint", None)
    if own:
        return own
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
