"""Rows of an Arrow column as numpy views of the memory-mapped file: no copy, and a hundredth of the time of a Dataset's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


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


class _Chunk:
    def __init__(self, array: pa.Array) -> None:
        self.offsets = array.offsets.to_numpy() if pa.types.is_list(array.type) else None
        self.inner = _Chunk(array.values) if pa.types.is_list(array.type) else array.to_numpy()

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

    def lengths(self) -> np.ndarray:
        lengths = np.diff(self.offsets)
        if self.inner.offsets is None:
            return lengths
        first, last = self.offsets[0], self.offsets[-1]
        return np.maximum.reduceat(self.inner.lengths()[first:last], self.offsets[:-1] - first)
