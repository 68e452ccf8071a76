"""Where each prepared row came from: file and line, kept beside the tokens, so that a batch at fault can be named."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from dsrecipes.data.columns import read_columns
from dsrecipes.errors import inflect

_SHOWN = 24
"""Row numbers that a message names; the rest are counted."""


def origins_path(rows: Path) -> Path:
    """The file of places beside a prepared split's file of tokens."""
    return rows.with_suffix(".rows")


class Origins:
    """Places of the rows that a split keeps, as they are written: a number in 4 bytes, a file's name once."""

    def __init__(self) -> None:
        self.sources: dict[str, int] = {}
        self.source, self.number, self.tokens = array("i"), array("q"), array("q")

    def add(self, where: str, tokens: int) -> None:
        """A kept row's place (`FILE, line 7`) and its tokens."""
        source, _, number = where.rpartition(" ")
        if not number.isdecimal():
            source, number = where, "0"
        self.source.append(self.sources.setdefault(source, len(self.sources)))
        self.number.append(int(number))
        self.tokens.append(tokens)

    def write(self, path: Path) -> None:
        """Write them as an Arrow stream."""
        names = pa.DictionaryArray.from_arrays(pa.array(self.source, pa.int32()), pa.array(list(self.sources), pa.string()))
        table = pa.table({"source": names, "number": pa.array(self.number), "tokens": pa.array(self.tokens)})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def places(path: Path, rows: Iterable[int], block: int | None = None) -> str:
    """Prepared rows as places of the user's files: `a.json, rows 3, 17; b.json, row 2`.

    Args:
        path: the split's file of tokens.
        rows: numbers of its rows.
        block: tokens of a block, where texts were joined and cut: each block is named by the first and last row in it.
    """
    rows = sorted(set(rows))
    if not origins_path(path).is_file():
        return f"prepared {inflect(len(rows), 'row')} {', '.join(map(str, rows[:_SHOWN]))}"
    table = read_columns(origins_path(path))
    if block is not None:
        ends = np.cumsum(table.column("tokens").to_numpy())
        spans = [
            (int(np.searchsorted(ends, row * block, "right")), int(np.searchsorted(ends, (row + 1) * block))) for row in rows
        ]
        rows = sorted({each for first, last in spans for each in (first, min(last, len(ends) - 1))})
    shown = [(table.column("source")[row].as_py(), table.column("number")[row].as_py()) for row in rows[:_SHOWN]]
    return place_words(shown, len(rows))


def place_words(places: list[tuple[str, int]], count: int) -> str:
    """(`a.json, row`, 3), ... as `a.json, rows 3, 17; b.json, row 2`, of the first of `count` places."""
    numbers: dict[str, list[int]] = {}
    for source, number in places[:_SHOWN]:
        numbers.setdefault(source, []).append(number)
    words = [f"{inflect(len(set(n)), source)} {', '.join(map(str, sorted(set(n))))}" for source, n in numbers.items()]
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return "; ".join(words) + more
