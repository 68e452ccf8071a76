"""How does JSON of any form become tables? Metrics, comparisons and samples in a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsrecipes.reporting.recorded import is_number

Json = Any
_CELL = 2000
"""Most characters of a cell; a longer text is cut and says so."""
_DEEP = 3
"""Levels of objects that become tables of their own; deeper ones are shown as JSON."""


@dataclass(frozen=True)
class Table:
    """A caption, a header and rows; `total` counts the rows before a long table was cut."""

    caption: str
    columns: list[str]
    rows: list[list[Json]]
    total: int

    @property
    def right(self) -> list[bool]:
        """Which columns hold only numbers, which are aligned to the right."""
        columns = zip(*self.rows, strict=True)
        numeric = [all(value is None or is_number(value) for value in column) for column in columns]
        # Without rows there are no columns to look at.
        return numeric or [False] * len(self.columns)


def is_plain(value: Json) -> bool:
    """Whether a value fits one cell."""
    return not isinstance(value, (dict, list))


def tables(value: Json, caption: str, room: int, depth: int = 0) -> list[Table]:
    """A value as tables: the plain values of an object first, then a table for each object or list inside it.

    Args:
        value: any JSON.
        caption: what the first table is called.
        room: characters that one table may take; its first rows that fit are shown.
        depth: objects around this value.
    """
    # {"physics": {"accuracy": ...}, ...}: one table with a row per name reads better than one table per name.
    if isinstance(value, dict) and value and all(map(_is_record, value.values())):
        return [_records([{"": name} | record for name, record in value.items()], caption, room)]
    if isinstance(value, dict) and depth < _DEEP:
        plain = [[name, item] for name, item in value.items() if is_plain(item)]
        result = [_cut(caption, ["", ""], plain, room)] if plain else []
        for name, item in value.items():
            if not is_plain(item):
                result += tables(item, f"{caption} · {name}", room, depth + 1)
        return result
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [_records(value, caption, room)]
    items = value if isinstance(value, list) else [value]
    return [_cut(caption, [""], [[item] for item in items], room)] if items else []


def by_run(runs: list[tuple[str, Mapping[str, Json]]]) -> Table:
    """Plain values of several runs side by side, below the runs' names."""
    keys = dict.fromkeys(key for _, values in runs for key, value in values.items() if is_plain(value))
    rows = [[key, *(values.get(key) for _, values in runs)] for key in keys]
    return Table("", ["", *(name for name, _ in runs)], rows, len(rows))


def differing(table: Table) -> Table:
    """The rows whose values are not the same for all runs."""
    # The first column is the name of the row.
    rows = [row for row in table.rows if any(value != row[1] for value in row[2:])]
    return Table(table.caption, table.columns, rows, len(rows))


def nested(runs: list[tuple[str, Mapping[str, Json]]]) -> list[Table]:
    """Objects of objects (accuracy by subject) of several runs, joined by name: one table for each key."""
    keys = dict.fromkeys(key for _, values in runs for key, value in values.items() if _is_nest(value))
    return [_joined(key, runs) for key in keys]


def _joined(key: str, runs: list[tuple[str, Mapping[str, Json]]]) -> Table:
    """The objects that the runs have for one key, a row for each name and a column for each run and inner key."""
    nests = {name: values[key] for name, values in runs if _is_nest(values.get(key))}
    heads = [
        (name, head)
        for name, nest in nests.items()
        for head in dict.fromkeys(head for record in nest.values() for head in record)
    ]
    rows = [
        [row, *(nests[name].get(row, {}).get(head) for name, head in heads)]
        for row in dict.fromkeys(row for nest in nests.values() for row in nest)
    ]
    columns = ["", *(head if len(runs) == 1 else f"{name}: {head}" for name, head in heads)]
    return Table(key, columns, rows, len(rows))


def _is_record(value: Json) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(is_plain, value.values()))


def _is_nest(value: Json) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_record, value.values()))


def _records(records: list[dict[str, Json]], caption: str, room: int) -> Table:
    columns = list(dict.fromkeys(key for record in records for key in record))
    return _cut(caption, columns, [[record.get(key) for key in columns] for record in records], room)


def _cut(caption: str, columns: list[str], rows: list[list[Json]], room: int) -> Table:
    """A table of the first rows that fit into `room` characters, at least one."""
    shown: list[list[Json]] = []
    for row in rows:
        cells = [_cell(value) for value in row]
        room -= sum(len(str(cell)) for cell in cells)
        # At least one row, so that a reader sees what the table is about.
        if room < 0 and shown:
            break
        shown.append(cells)
    return Table(caption, columns, shown, len(rows))


def _cell(value: Json) -> Json:
    """A value as it fills a cell: a list as lines, a nested value as JSON, a long text cut."""
    if isinstance(value, list) and all(map(is_plain, value)):
        value = "\n".join(map(str, value))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > _CELL:
        return f"{text[:_CELL]} … (+{len(text) - _CELL:,})"
    return value if is_plain(value) else text
