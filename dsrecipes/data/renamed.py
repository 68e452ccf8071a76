"""Which column of a file does a recipe read under which name? --columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from dsrecipes.data.row import Row, fingerprint, located
from dsrecipes.errors import UserError, nearest

_LOOKED_AT = 1000
"""Number of first rows of which one must have a column; in JSON a row may leave out an empty field."""


class MappedRow(dict):
    """A row with columns that the user renamed; `mapped` are the new names.

    A subclass of dict, so that format_row gets an ordinary row and need not know of --columns.
    """

    mapped: tuple[str, ...] = ()


class OptionalColumns(dict):
    """A --columns mapping for rows that need not have any of the columns, such as those of a file of prompts."""


def renamed(splits: dict[str, Iterable[Row]], columns: Mapping[str, str]) -> dict[str, Iterable[Row]]:
    """Rename the columns of each split's rows; rows that are renamed already stay.

    Args:
        splits: rows by split.
        columns: the recipe's name -> the file's column. Data without one of the columns are refused when they are first
            read, unless this is OptionalColumns.
    """
    if not columns:
        return splits
    pairs, required = tuple(columns.items()), not isinstance(columns, OptionalColumns)
    return {name: rows if _is_renamed(rows) else RenamedRows(rows, pairs, required) for name, rows in splits.items()}


def _is_renamed(rows: Any) -> bool:
    """Return whether a recipe's load_rows has renamed the columns, perhaps below rows of its own."""
    while rows is not None and not isinstance(rows, RenamedRows):
        rows = getattr(rows, "rows", None)
    return rows is not None


def with_names(row: Row, columns: Mapping[str, str]) -> Row:
    """Rename those of the columns that a row has."""
    return RenamedRows((), tuple(columns.items())).rename(row) if columns else row


@dataclass(frozen=True)
class RenamedRows:
    """Rows with renamed columns; renamed when they are read, so that files need not be rewritten."""

    rows: Iterable[Row]
    columns: tuple[tuple[str, str], ...]
    """(the recipe's name, the file's column)."""
    required: bool = True

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.located())

    def located(self) -> Iterator[tuple[str, Row]]:
        """Yield rows with their places (UserError: no row has one of the columns)."""
        rows = located(self.rows)
        first = list(islice(rows, _LOOKED_AT))
        self.check(first)
        return self.apply(chain(first, rows))

    def apply(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """Rename the columns of (place, row)."""
        return ((place, self.rename(row)) for place, row in rows)

    @property
    def fingerprint(self) -> str:
        """Hash of the rows, and the names."""
        return f"{self.columns} {fingerprint(self.rows)}"

    def check(self, rows: list[tuple[str, Row]]) -> None:
        """Check the first rows of data (UserError: none of them has a required column)."""
        for name, column in self.columns if self.required and rows else ():
            if any(name in getattr(row, "mapped", ()) or _has(row, column) for _, row in rows):
                continue
            known = list(dict.fromkeys(str(key) for _, row in rows for key in row))
            file = rows[0][0].rpartition(", ")[0] or "the data"
            raise UserError(
                "DSR130",
                f"--columns {name}={column}: {file} has no column {column!r}{nearest(column, known)}; it has "
                f"{', '.join(known)}",
            )

    def rename(self, row: Row) -> Row:
        """Return the row with its columns renamed."""
        if isinstance(row, MappedRow):
            return row  # a recipe's load_rows has renamed it
        result = MappedRow(row)
        values = {name: _take(result, row, column) for name, column in self.columns if _has(row, column)}
        for name in values.keys() & result.keys():
            # under a name that no recipe reads, so that the header counts the column as unused
            result[f"{name} (replaced by --columns)"] = result.pop(name)
        if not values:
            return row
        result.update(values)
        result.mapped = tuple(values)
        return result


def _has(row: Row, column: str) -> bool:
    """Return whether a row has a column, or `column.key` inside one."""
    # the full name first, because a column of a file may contain a dot
    if column in row:
        return True
    head, _, rest = column.partition(".")
    inner = row.get(head)
    return bool(rest) and isinstance(inner, dict) and _has(inner, rest)


def _take(result: Row, row: Row, column: str) -> Any:
    """Move the value of a column, or of `column.key` inside one, out of the result."""
    if column in row:
        result.pop(column, None)
        return row[column]
    head, _, rest = column.partition(".")
    inner = dict(result[head] if head in result else row[head])
    result[head] = inner
    value = _take(inner, row[head], rest)
    if not inner:
        del result[head]
    return value
