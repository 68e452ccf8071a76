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


ORIGIN = pa.schema({"source": pa.dictionary(pa.int32(), pa.string()), "number": pa.int64(), "tokens": pa.int32()})
"""A sequence's file, its row's number in it, and its tokens; each batch has the names of its own files once."""


def origins(places: Iterable[str], tokens: Iterable[int]) -> pa.RecordBatch:
    """Sequences' places (`FILE, line 7`) and tokens, as written beside them."""
    sources, indices, numbers = dict[str, int](), array("i"), array("q")
    for where in places:
        source, _, number = where.rpartition(" ")
        if not number.isdecimal():
            source, number = where, "0"
        indices.append(sources.setdefault(source, len(sources)))
        numbers.append(int(number))
    names = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(list(sources), pa.string()))
    return pa.record_batch([names, pa.array(numbers, pa.int64()), pa.array(tokens, pa.int32())], schema=ORIGIN)


def describe_places(path: Path, rows: Iterable[int], block: int | None = None) -> str:
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
