"""Columns in an Arrow file, and their rows as numpy views of it: no copy, and a hundredth of the time of a Dataset's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

_PIECE = 16 << 20
"""Bytes of a batch in a file: many small ones would cost memory for each when the file is mapped."""


class ColumnWriter:
    """Writes batches as an Arrow stream while they are made; a file without a batch is empty.

    `fingerprint` is a hash of the numbers, whatever batches they came in, and `largest` the greatest of `input_ids`.
    """

    def __init__(self, path: Path, piece: int = _PIECE) -> None:
        """Batches are joined to one of `piece` bytes; 0 writes them as they come."""
        self._sink = pa.OSFile(str(path), "wb")
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._piece, self._waiting, self._size = piece, list[pa.RecordBatch](), 0
        self._hashes: dict[tuple[str, int], Any] = {}
        self.rows, self.largest = 0, -1

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._waiting and error[0] is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        self._sink.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows; their columns are those of the first batch."""
        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._sink, batch.schema)
            self._schema = batch.schema
        batch = batch if batch.schema == self._schema else batch.cast(self._schema)
        self._hash(batch)
        self.rows += len(batch)
        self._waiting.append(batch)
        self._size += batch.nbytes
        if self._size >= self._piece:
            self._flush()

    def _flush(self) -> None:
        assert self._writer is not None
        for batch in pa.Table.from_batches(self._waiting).combine_chunks().to_batches():
            self._writer.write_batch(batch)
        self._waiting, self._size = [], 0

    def _hash(self, batch: pa.RecordBatch) -> None:
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            if not Column.reads(array.type):
                continue
            depth = 0
            while pa.types.is_list(array.type):
                self._hashes.setdefault((name, depth), hashlib.sha256()).update(np.diff(view(array.offsets)))
                array, depth = array.flatten(), depth + 1
            numbers = view(array)
            self._hashes.setdefault((name, depth), hashlib.sha256()).update(np.ascontiguousarray(numbers))
            if name == "input_ids":
                self.largest = max(self.largest, int(numbers.max(initial=-1)))

    @property
    def fingerprint(self) -> str:
        """A hash of the numbers and of the lengths of their lists, column by column."""
        parts = (f"{name} {depth} {hashed.hexdigest()}" for (name, depth), hashed in sorted(self._hashes.items()))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def write_columns(path: Path, batches: Iterable[dict[str, list]]) -> None:
    """Write batches of columns as an Arrow stream; without a batch the file is empty."""
    with ColumnWriter(path) as writer:
        for batch in batches:
            writer.write(record_batch(batch))


def record_batch(columns: dict[str, list]) -> pa.RecordBatch:
    """Columns as Arrow arrays, numbers in 32 bits; empty lists get the type that the column has elsewhere."""
    return pa.RecordBatch.from_pydict({name: _array(name, values) for name, values in columns.items()})


def read_columns(path: Path) -> pa.Table:
    """The table of an Arrow stream, memory-mapped."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow stream, read one after another: no more than one is in memory."""
    if path.stat().st_size:
        with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader


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


def _array(name: str, values: list) -> pa.Array:
    array = pa.array(values)
    kind, depth = array.type, 0
    while pa.types.is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if pa.types.is_int64(kind):
        small = pa.int32()
    elif depth and pa.types.is_null(kind):  # only empty lists here; other batches may have numbers
        small = pa.float32() if name == "weights" else pa.int32()
    elif depth and pa.types.is_float64(kind):
        small = pa.float32()
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

    def numbers(self) -> list[np.ndarray]:
        """All numbers, chunk by chunk and flattened over every level of lists."""
        return [chunk.numbers() for chunk in self.chunks]

    def lengths(self) -> np.ndarray:
        """Numbers in each row; of a list of lists those of its longest."""
        return np.concatenate([chunk.lengths() for chunk in self.chunks])


def view(numbers: pa.Array) -> np.ndarray:
    """The numbers where they lie; to_numpy gives the same, but imports pandas first, which takes half a second."""
    return np.from_dlpack(numbers) if len(numbers) else np.empty(0, np.int32)


class _Chunk:
    def __init__(self, array: pa.Array) -> None:
        self.offsets = view(array.offsets) if pa.types.is_list(array.type) else None
        self.inner = _Chunk(array.values) if pa.types.is_list(array.type) else view(array)

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
