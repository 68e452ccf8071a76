"""From which file and line did each prepared row come?

The places are stored next to the tokens, so that a message about a batch can name the rows of the user's files.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from dsrecipes.data.columns import read_columns
from dsrecipes.errors import inflect

_SHOWN = 24
"""Row numbers that a message lists; the rest are only counted."""
_SCHEMA = pa.schema({"source": pa.dictionary(pa.int32(), pa.string()), "number": pa.int64(), "tokens": pa.int32()})
"""A sequence's file, the number of its row in that file, and its tokens. Each batch stores the names of its files once."""


class RowSources:
    """The origin of the rows of one prepared split: a file of (source, number, tokens), one entry for each sequence."""

    def __init__(self, rows: Path) -> None:
        """Name the file that belongs to the split whose tokens are in `rows`."""
        self.path = rows.with_suffix(".rows")

    @staticmethod
    def batch(places: Iterable[str], tokens: Iterable[int]) -> pa.RecordBatch:
        """Build the entries of some sequences from their places (`FILE, line 7`) and their numbers of tokens."""
        sources, indices, numbers = dict[str, int](), array("i"), array("q")
        # split into file and number, so that a batch stores the name of a file once
        for place in places:
            source, _, number = place.rpartition(" ")
            if not number.isdecimal():
                source, number = place, "0"
            indices.append(sources.setdefault(source, len(sources)))
            numbers.append(int(number))
        names = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(list(sources), pa.string()))
        return pa.record_batch([names, pa.array(numbers, pa.int64()), pa.array(tokens, pa.int32())], schema=_SCHEMA)

    def describe(self, rows: Iterable[int], block: int | None = None) -> str:
        """Name prepared rows as places in the user's files: `a.json, rows 3, 17; b.json, row 2`.

        Args:
            rows: numbers of prepared rows.
            block: tokens of a block, where texts were joined and cut: each block is named by its first and last row.
        """
        rows = sorted(set(rows))
        if not self.path.is_file():
            return f"prepared {inflect(len(rows), 'row')} {', '.join(map(str, rows[:_SHOWN]))}"
        table = read_columns(self.path)
        if block is not None:
            rows = _rows_of_blocks(table.column("tokens").to_numpy(), rows, block)
        shown = [(table.column("source")[row].as_py(), table.column("number")[row].as_py()) for row in rows[:_SHOWN]]
        return describe_places(shown, len(rows))


def _rows_of_blocks(tokens: np.ndarray, blocks: list[int], size: int) -> list[int]:
    """Find the first and the last row in each block of `size` tokens; `tokens` are the lengths of the rows."""
    ends = np.cumsum(tokens)
    firsts = [int(np.searchsorted(ends, block * size, "right")) for block in blocks]
    lasts = [min(int(np.searchsorted(ends, (block + 1) * size)), len(ends) - 1) for block in blocks]
    return sorted({*firsts, *lasts})


def describe_places(places: list[tuple[str, int]], count: int) -> str:
    """Join (`a.json, row`, 3), ... to `a.json, rows 3, 17; b.json, row 2`; the first of `count` places."""
    numbers: dict[str, set[int]] = {}
    for source, number in places[:_SHOWN]:
        numbers.setdefault(source, set()).add(number)
    texts = [f"{inflect(len(unique), source)} {', '.join(map(str, sorted(unique)))}" for source, unique in numbers.items()]
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return "; ".join(texts) + more
