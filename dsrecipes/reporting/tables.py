"""JSON as tables, whatever its form: what a report shows of metrics, comparisons and samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsrecipes.reporting.recorded import is_number

Json = Any
_CELL = 2000
"""Characters of a cell; a longer text is cut and says so."""
_DEEP = 3


@dataclass(frozen=True)
class Table:
    """A caption, a header and rows; `total` counts the rows before a long table was cut."""

    caption: str
    columns: list[str]
    rows: list[list[Json]]
    total: int

    @property
    def right(self) -> list[bool]:
        """Which columns hold numbers alone."""
        columns = zip(*self.rows, strict=True)
        return [all(value is None or is_number(value) for value in column) for column in columns] or [False] * len(
            self.columns
        )


def is_plain(value: Json) -> bool:
    """Whether a value fills one cell."""
    return not isinstance(value, (dict, list))


def tables(value: Json, caption: str, room: int, depth: int = 0) -> list[Table]:
    """A value as tables: the plain values of an object first, then a table for each object or list inside it.

    Args:
        room: characters that one table may take; its first rows that fit are shown.
    """
    if isinstance(value, dict) and value and all(_is_record(each) for each in value.values()):
        return [_records([{"": name} | each for name, each in value.items()], caption, room)]
    if isinstance(value, dict) and depth < _DEEP:
        plain = [[name, each] for name, each in value.items() if is_plain(each)]
        found = [_cut(caption, ["", ""], plain, room)] if plain else []
        for name, each in value.items():
            if not is_plain(each):
                found += tables(each, f"{caption} · {name}", room, depth + 1)
        return found
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return [_records(value, caption, room)]
    items = value if isinstance(value, list) else [value]
    return [_cut(caption, [""], [[each] for each in items], room)] if items else []


def by_run(found: list[tuple[str, Mapping[str, Json]]]) -> Table:
    """Plain values of several runs side by side, under the runs' names."""
    keys = dict.fromkeys(key for _, values in found for key, value in values.items() if is_plain(value))
    rows = [[key, *(values.get(key) for _, values in found)] for key in keys]
    return Table("", ["", *(name for name, _ in found)], rows, len(rows))


def differing(table: Table) -> Table:
    """The rows whose values are not the same for all runs."""
    rows = [row for row in table.rows if any(value != row[1] for value in row[2:])]
    return Table(table.caption, table.columns, rows, len(rows))


def nested(found: list[tuple[str, Mapping[str, Json]]]) -> list[Table]:
    """Objects of objects (accuracy by subject) of several runs, joined by name: a table for each key."""
    result = []
    for key in dict.fromkeys(key for _, values in found for key, value in values.items() if _is_nest(value)):
        parts = [(name, values.get(key, {})) for name, values in found if _is_nest(values.get(key))]
        heads = [(name, head) for name, part in parts for head in dict.fromkeys(h for each in part.values() for h in each)]
        held = dict(parts)
        names = dict.fromkeys(row for _, part in parts for row in part)
        rows = [[row, *(held[name].get(row, {}).get(head) for name, head in heads)] for row in names]
        columns = ["", *(head if len(found) == 1 else f"{name}: {head}" for name, head in heads)]
        result.append(Table(key, columns, rows, len(rows)))
    return result


def _is_record(value: Json) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(is_plain, value.values()))


def _is_nest(value: Json) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_record, value.values()))


def _records(records: list[dict[str, Json]], caption: str, room: int) -> Table:
    columns = list(dict.fromkeys(key for each in records for key in each))
    return _cut(caption, columns, [[each.get(key) for key in columns] for each in records], room)


def _cut(caption: str, columns: list[str], rows: list[list[Json]], room: int) -> Table:
    kept = []
    for row in rows:
        cells = [_cell(value) for value in row]
        room -= sum(len(str(cell)) for cell in cells)
        if room < 0 and kept:
            break
        kept.append(cells)
    return Table(caption, columns, kept, len(rows))


def _cell(value: Json) -> Json:
    if isinstance(value, list) and all(map(is_plain, value)):
        value = "\n".join(map(str, value))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > _CELL:
        return f"{text[:_CELL]} … (+{len(text) - _CELL:,})"
    return value if is_plain(value) else text
