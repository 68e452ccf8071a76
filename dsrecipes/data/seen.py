"""Which forms the rows of a split have, and which of their columns are used: counted while rows are formatted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsrecipes.errors import UserError, nearest, plural

_SHOWN = 12
"""Columns that the header names; the rest are counted."""


_NONE: set[str] = set()


class ReadRow(dict):
    """A row that knows which of its columns were read, and what form it was found to have."""

    __slots__ = ("form", "mapped", "original", "read", "unused")

    def __init__(self, row: dict[str, Any]) -> None:
        """A copy of the row."""
        super().__init__(row)
        self.original = row
        self.read: set[Any] = set()
        self.form = "rows"
        self.unused: set[str] = _NONE
        """Keys inside a column that are not used, such as `messages.id`."""
        self.mapped: tuple[str, ...] = () if type(row) is dict else getattr(row, "mapped", ())

    def __getitem__(self, name: Any) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        """Like a dict's."""
        self.read.add(name)
        return super().get(name, default)

    def _all_read(self) -> dict[str, Any]:
        self.read.update(dict.keys(self))
        return dict(dict.items(self))

    def __iter__(self) -> Any:
        return iter(self._all_read())

    def keys(self) -> Any:
        """Like a dict's; whoever asks for all columns is taken to use them all."""
        return self._all_read().keys()

    def values(self) -> Any:
        """Like a dict's."""
        return self._all_read().values()

    def items(self) -> Any:
        """Like a dict's."""
        return self._all_read().items()

    def copy(self) -> dict[str, Any]:
        """A plain dict."""
        return self._all_read()

    def __or__(self, other: Any) -> dict[str, Any]:
        return self._all_read() | other

    def __ror__(self, other: Any) -> dict[str, Any]:
        return other | self._all_read()


class LowerNames(Mapping):
    """A row's columns by their names in lower case; only what is asked for counts as read."""

    def __init__(self, row: dict[str, Any]) -> None:
        """A view of the row."""
        self.row = row
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
    """Refuse a column that --columns maps, that holds something and that the recipe did not use: a name it does not know."""
    for name in row.mapped:
        if name not in row.read and dict.get(row, name) not in (None, "", [], {}):
            used = [str(column) for column in dict.keys(row) if column in row.read]
            raise UserError(
                f"--columns {name}=...: {name!r} is not used in such rows ({row.form}){nearest(name, used)}; used are "
                f"{', '.join(used) or 'none of their columns'}"
            )


def name_form(row: dict[str, Any], form: str) -> None:
    """Let format_row say what form a row has, for the header."""
    if type(row) is ReadRow:
        row.form = form


@dataclass
class Seen:
    """Counts over rows; two of them, from two processes, can be merged."""

    forms: dict[str, int] = field(default_factory=dict)
    """Form -> rows of it."""
    columns: dict[str, dict[str, int]] = field(default_factory=dict)
    """Form -> column that was used -> rows where it held something."""
    unused: dict[str, int] = field(default_factory=dict)
    """Column -> rows where it held something that was not used."""

    def format(self, format_row: Callable[[dict[str, Any]], dict], row: dict[str, Any]) -> dict:
        """The row through format_row, counted unless that fails."""
        observed = ReadRow(row)
        record = format_row(observed)
        if record is observed:
            record = observed.copy()
        _check_mapped(observed)
        self._count(observed)
        return record

    def _count(self, row: ReadRow) -> None:
        self.forms[row.form] = self.forms.get(row.form, 0) + 1
        columns = self.columns.setdefault(row.form, {})
        read = row.read
        for name, value in dict.items(row):
            if value or not (value is None or isinstance(value, (str, list, dict))):  # 0 and false are something
                counts = columns if name in read else self.unused
                key = name if type(name) is str else str(name)
                counts[key] = counts.get(key, 0) + 1
        for name in row.unused:
            self.unused[name] = self.unused.get(name, 0) + 1

    def merge(self, other: Seen) -> None:
        """Add the counts of other rows."""
        for mine, theirs in ((self.forms, other.forms), (self.unused, other.unused)):
            _add(mine, theirs)
        for form, columns in other.columns.items():
            _add(self.columns.setdefault(form, {}), columns)

    def words(self) -> list[str]:
        """Lines for the header: the forms with their columns, and the columns that are not used."""
        forms = [
            (f"{count:,} " if len(self.forms) > 1 else "") + form + _listed(self.columns.get(form, ()))
            for form, count in sorted(self.forms.items(), key=lambda pair: -pair[1])
        ]
        most = sum(self.forms.values())
        unused = [name + (f" (in {plural(n, 'row')})" if n < most else "") for name, n in sorted(self.unused.items())]
        return [", ".join(forms), *([f"unused columns: {_shortened(unused)}"] if unused else [])]


def _add(mine: dict[str, int], theirs: dict[str, int]) -> None:
    for name, count in theirs.items():
        mine[name] = mine.get(name, 0) + count


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _listed(columns: Iterable[str]) -> str:
    return f" ({_shortened(columns)})" if columns else ""
