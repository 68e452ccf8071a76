"""Columns in an Arrow file, and their rows as numpy views of it: no copy, and a hundredth of the time of a Dataset's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


def write_columns(path: Path, batches: Iterable[dict[str, list]]) -> None:
    """Write batches of columns as an Arrow stream, numbers in 32 bits; without a batch the file is empty."""
    writer = None
    with pa.OSFile(str(path), "wb") as sink:
        for batch in batches:
            table = pa.RecordBatch.from_pydict({name: _array(values) for name, values in batch.items()})
            writer = writer or pa.ipc.new_stream(sink, table.schema)
            writer.write_batch(table)
        if writer is not None:
            writer.close()


def read_columns(path: Path) -> pa.Table:
    """The table of an Arrow stream, memory-mapped."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def fingerprint_columns(path: Path) -> str:
    """A hash of the numbers in an Arrow stream."""
    hashed, table = hashlib.sha256(), read_columns(path)
    for name in table.column_names:
        if Column.reads(table.schema.field(name).type):
            for chunk in table.column(name).chunks:
                for buffer in chunk.buffers():
                    hashed.update(buffer or b"")
    return hashed.hexdigest()[:16]


def first_beyond(path: Path, name: str, limit: int) -> tuple[int, int] | None:
    """(row, number) of the first number in a column that is `limit` or more; None where there is none."""
    start = 0
    for chunk in read_columns(path).column(name).chunks:
        column = _Chunk(chunk)
        if column.numbers().max(initial=0) >= limit:
            for row in range(len(chunk)):
                lists = column[row]
                numbers = np.concatenate(list(lists)) if lists.dtype == object else lists
                if (numbers >= limit).any():
                    return start + row, int(numbers[numbers >= limit][0])
        start += len(chunk)
    return None


def _array(values: list) -> pa.Array:
    array = pa.array(values)
    kind, depth = array.type, 0
    while pa.types.is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if pa.types.is_int64(kind):
        small = pa.int32()
    elif pa.types.is_float64(kind) or (depth and pa.types.is_null(kind)):
        small = pa.float32()  # lists without a number in this batch are weights, which other batches may have
    else:
        return array
    for _ in range(depth):
        small = pa.list_(small)
    return array.cast(small)


class Column:
    """Numbers, lists of numbers, or lists of lists of numbers, by row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.chunks = [_Chunk(chunk) for chunk in column.chunks]
        self.starts = np.cumsum([0, *map(len, column.chunks)])

    @staticmethod
    def reads(kind: pa.DataType) -> bool:
        """Whether a column of this type can be read."""
        while pa.types.is_list(kind):
            kind = kind.value_type
        return pa.types.is_integer(kind) or pa.types.is_floating(kind)

    def __getitem__(self, row: int) -> Any:
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.chunks[chunk][row - self.starts[chunk]]

    def lengths(self) -> np.ndarray:
        """Numbers in each row; of a list of lists those of its longest."""
        return np.concatenate([chunk.lengths() for chunk in self.chunks])


def _view(numbers: pa.Array) -> np.ndarray:
    """The numbers where they lie; to_numpy gives the same, but imports pandas first, which takes half a second."""
    return np.from_dlpack(numbers) if len(numbers) else np.empty(0, np.int32)


class _Chunk:
    def __init__(self, array: pa.Array) -> None:
        self.offsets = _view(array.offsets) if pa.types.is_list(array.type) else None
        self.inner = _Chunk(array.values) if pa.types.is_list(array.type) else _view(array)

    def __getitem__(self, row: int) -> Any:
        if self.offsets is None:
            return self.inner[row]
        start, end = self.offsets[row], self.offsets[row + 1]
        if self.inner.offsets is None:
            return self.inner.inner[start:end]
        lists = np.empty(end - start, dtype=object)
        for index in range(start, end):
            lists[index - start] = self.inner[index]
        return lists

    def numbers(self) -> np.ndarray:
        """All numbers, flattened over every level of lists."""
        return self.inner.numbers() if isinstance(self.inner, _Chunk) else self.inner

    def lengths(self) -> np.ndarray:
        lengths = np.diff(self.offsets)
        if self.inner.offsets is None:
            return lengths
        first, last = self.offsets[0], self.offsets[-1]
        return np.maximum.reduceat(self.inner.lengths()[first:last], self.offsets[:-1] - first)
