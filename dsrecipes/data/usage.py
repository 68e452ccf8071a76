"""Which formats do the rows of a split have, and which of their columns are used? For the header.

Usage is counted while rows are formatted: a row records which of its columns format_row reads. So a recipe of the user's own
need not declare its columns, and the counts cannot differ from what is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsrecipes.errors import UserError, nearest, plural

_SHOWN = 12
"""Columns that the header names; the rest are only counted."""
# one set for all rows, because most rows have no unused keys and there are millions of rows
_NONE: set[str] = set()
_CAN_BE_EMPTY = (str, list, dict, type(None))


class ReadRow(dict):
    """A row that records which of its columns are read, and which format it has."""

    __slots__ = ("format", "mapped", "original", "read", "unused")

    def __init__(self, row: dict[str, Any]) -> None:
        """Copy a row."""
        super().__init__(row)
        self.original = row
        self.read: set[Any] = set()
        self.format = "rows"
        self.unused: set[str] = _NONE
        """Keys inside a column that are not used, such as `messages.id`."""
        self.mapped: tuple[str, ...] = () if type(row) is dict else getattr(row, "mapped", ())

    def __getitem__(self, name: Any) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        """Return a value as a dict does; its column counts as used."""
        self.read.add(name)
        return super().get(name, default)

    def _all_read(self) -> dict[str, Any]:
        self.read.update(dict.keys(self))
        return dict(dict.items(self))

    def __iter__(self) -> Any:
        return iter(self._all_read())

    def keys(self) -> Any:
        """Return the keys of a dict; code that reads all columns counts as using all."""
        return self._all_read().keys()

    def values(self) -> Any:
        """Return the values of a dict; all columns count as used."""
        return self._all_read().values()

    def items(self) -> Any:
        """Return the items of a dict; all columns count as used."""
        return self._all_read().items()

    def copy(self) -> dict[str, Any]:
        """Return a plain dict."""
        return self._all_read()

    # dict overloads these for other types of keys, which the columns of a row never have
    def __or__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return self._all_read() | other

    def __ror__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return other | self._all_read()


class LowerNames(Mapping):
    """A view of a row by the names of its columns in lower case; only columns that are read count as used."""

    def __init__(self, row: dict[str, Any]) -> None:
        """View a row."""
        self.row = row
        # dict.keys, because row.keys() would count every column as used
        self.names = {str(key).strip().lower(): key for key in dict.keys(row)}

    def __getitem__(self, name: str) -> Any:
        return self.row[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _check_mapped(row: ReadRow) -> None:
    """Refuse a column of --columns that has content and was not read: the recipe does not know the name."""
    for name in row.mapped:
        if name not in row.read and dict.get(row, name) not in (None, "", [], {}):
            used = [str(column) for column in dict.keys(row) if column in row.read]
            raise UserError(
                "DSR131",
                f"--columns {name}=...: {name!r} is not used in such rows ({row.format}){nearest(name, used)}; used are "
                f"{', '.join(used) or 'none of their columns'}",
            )


def name_format(row: dict[str, Any], name: str) -> None:
    """Let format_row name the format of a row, for the header."""
    if type(row) is ReadRow:
        row.format = name


@dataclass
class ColumnUsage:
    """Counts over rows; those of several processes can be merged. Stored in stats.json and data.json."""

    forms: dict[str, int] = field(default_factory=dict)
    """Format -> rows."""
    columns: dict[str, dict[str, int]] = field(default_factory=dict)
    """Format -> column that was used -> rows where it held something."""
    unused: dict[str, int] = field(default_factory=dict)
    """Column -> rows where it held something that was not used."""

    def format(self, format_row: Callable[[dict[str, Any]], dict], row: dict[str, Any]) -> dict:
        """Pass a row through format_row, and count it unless that raises."""
        observed = ReadRow(row)
        record = format_row(observed)
        # a recipe may return the row itself, which must not continue to record
        if record is observed:
            record = observed.copy()
        _check_mapped(observed)
        self._count(observed)
        return record

    def _count(self, row: ReadRow) -> None:
        self.forms[row.format] = self.forms.get(row.format, 0) + 1
        columns = self.columns.setdefault(row.format, {})
        read = row.read
        for name, value in dict.items(row):
            # 0 and false are values; an empty text or list is what files write for a missing one
            if value or not isinstance(value, _CAN_BE_EMPTY):
                counts = columns if name in read else self.unused
                key = name if type(name) is str else str(name)
                counts[key] = counts.get(key, 0) + 1
        for name in row.unused:
            self.unused[name] = self.unused.get(name, 0) + 1

    def merge(self, other: ColumnUsage) -> None:
        """Add the counts of other rows."""
        _add(self.forms, other.forms)
        _add(self.unused, other.unused)
        for name, columns in other.columns.items():
            _add(self.columns.setdefault(name, {}), columns)

    def describe(self) -> list[str]:
        """Return lines for the header: the formats with their columns, and the columns that are not used."""
        several = len(self.forms) > 1
        formats = []
        for name, count in sorted(self.forms.items(), key=lambda pair: -pair[1]):
            columns = self.columns.get(name, {})
            listed = f" ({_shortened(columns)})" if columns else ""
            formats.append(f"{count:,} {name}{listed}" if several else name + listed)
        if not self.unused:
            return [", ".join(formats)]
        total = sum(self.forms.values())
        unused = [f"{name} (in {plural(n, 'row')})" if n < total else name for name, n in sorted(self.unused.items())]
        return [", ".join(formats), f"unused columns: {_shortened(unused)}"]


def _add(counts: dict[str, int], others: dict[str, int]) -> None:
    for name, count in others.items():
        counts[name] = counts.get(name, 0) + count


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
