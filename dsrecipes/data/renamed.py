"""--columns: a file's columns under the names that a recipe reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from dsrecipes.data.files import Row, fingerprint, located
from dsrecipes.errors import UserError, nearest

_LOOKED_AT = 1000
"""Rows of which one must have a column: in JSON a row may lack what it has nothing for."""


class MappedRow(dict):
    """A row some of whose columns the user named; `mapped` are their new names."""

    mapped: tuple[str, ...] = ()


class OptionalColumns(dict):
    """Names of --columns for rows that need not have any of the columns."""


def renamed(splits: dict[str, Iterable[Row]], columns: Mapping[str, str]) -> dict[str, Iterable[Row]]:
    """Each split's rows with `columns` (recipe's name -> file's column) renamed; rows that are renamed already stay.

    Data without one of the columns are refused when they are first read, unless these are OptionalColumns.
    """
    if not columns:
        return splits
    pairs, required = tuple(columns.items()), not isinstance(columns, OptionalColumns)
    return {name: rows if _is_renamed(rows) else RenamedRows(rows, pairs, required) for name, rows in splits.items()}


def _is_renamed(rows: Any) -> bool:
    """Whether a recipe's load_rows has done it, perhaps below rows of its own making."""
    while rows is not None and not isinstance(rows, RenamedRows):
        rows = getattr(rows, "rows", None)
    return rows is not None


def with_names(row: Row, columns: Mapping[str, str]) -> Row:
    """A row with the columns that it has renamed."""
    return RenamedRows((), tuple(columns.items())).of(row) if columns else row


@dataclass(frozen=True)
class RenamedRows:
    """Rows under the recipe's names."""

    rows: Iterable[Row]
    columns: tuple[tuple[str, str], ...]
    required: bool = True

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.located())

    def located(self) -> Iterator[tuple[str, Row]]:
        """Rows with their places; raises UserError where no row has one of the columns."""
        rows = located(self.rows)
        first = list(islice(rows, _LOOKED_AT))
        self.check(first)
        return self.apply(chain(first, rows))

    def apply(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """(where, row) with each row under the recipe's names."""
        return ((where, self.of(row)) for where, row in rows)

    @property
    def fingerprint(self) -> str:
        """The rows' own and the names."""
        return f"{self.columns} {fingerprint(self.rows)}"

    def check(self, rows: list[tuple[str, Row]]) -> None:
        """Refuse the first rows of data where a column is required and none has it (UserError)."""
        for name, column in self.columns if self.required and rows else ():
            if any(name in getattr(row, "mapped", ()) or _has(row, column) for _, row in rows):
                continue
            known = list(dict.fromkeys(str(key) for _, row in rows for key in row))
            place = rows[0][0].rpartition(", ")[0] or "the data"
            raise UserError(
                f"--columns {name}={column}: {place} has no column {column!r}{nearest(column, known)}; it has {', '.join(known)}"
            )

    def of(self, row: Row) -> Row:
        """The row under the recipe's names."""
        if isinstance(row, MappedRow):
            return row  # a recipe's load_rows has done it
        result = MappedRow(row)
        values = {name: _take(result, row, column) for name, column in self.columns if _has(row, column)}
        for name in values.keys() & result.keys():
            result[f"{name} (replaced by --columns)"] = result.pop(name)  # so that it counts as unused
        if not values:
            return row
        result.update(values)
        result.mapped = tuple(values)
        return result


def _has(row: Row, column: str) -> bool:
    head, _, rest = column.partition(".")
    return column in row or (bool(rest) and isinstance(row.get(head), dict) and _has(row[head], rest))


def _take(result: Row, row: Row, column: str) -> Any:
    """The value of a column, or of `column.key` inside one, which leaves the row."""
    if column in row:
        result.pop(column, None)
        return row[column]
    head, _, rest = column.partition(".")
    result[head] = inner = dict(result.get(head, row[head]))
    value = _take(inner, row[head], rest)
    if not inner:
        del result[head]
    return value
