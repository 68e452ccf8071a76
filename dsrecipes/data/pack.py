"""Whole examples into sequences of max_length (best-fit decreasing), and token streams into blocks."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Bins:
    """Rows by bin, in two flat arrays: millions of small ones would cost gigabytes."""

    rows: np.ndarray
    """Row numbers (int32), ascending in each bin."""
    starts: np.ndarray
    """Where each bin begins in `rows`, and the end (int64)."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.rows[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))


@dataclass
class _Bunch:
    """Bins that hold examples of the same lengths."""

    count: int
    pattern: tuple[tuple[int, int], ...] = ()
    """(length, how many of them) in each bin."""


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> Bins:
    """Put examples into as few bins as best-fit decreasing finds; a function of the lengths alone.

    Best-fit decreasing (Johnson 1973): longest first, each into the fullest bin that still holds it. As lengths are
    whole numbers up to `capacity`, the examples of a length go to all bins of a free space at once: millions of
    examples take about as many operations as there are pairs of length and space.

    Args:
        lengths: tokens of each example, none above `capacity`.
        capacity: tokens of a bin.

    Returns:
        Bins of example indices, ordered by their first index.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    by_space: dict[int, list[_Bunch]] = {}
    filled = 0  # bit s is set where a bin with s free tokens exists
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fits = filled >> length
            if fits:
                space = length + (fits & -fits).bit_length() - 1
                bunch = by_space[space].pop()
            else:
                space, bunch = capacity, _Bunch(-(-left // max(1, capacity // max(1, length))))
            # the fullest bin that holds an example stays the fullest one until it holds no further one of this length
            each = min(space // length if length else left, left)
            count = min(bunch.count, left // each)
            if bunch.count > count:
                by_space.setdefault(space, []).append(_Bunch(bunch.count - count, bunch.pattern))
            elif fits and not by_space[space]:
                filled ^= 1 << space
            by_space.setdefault(space - each * length, []).append(_Bunch(count, (*bunch.pattern, (length, each))))
            filled |= 1 << (space - each * length)
            left -= count * each
    return _rows_of([bunch for space in sorted(by_space) for bunch in by_space[space] if bunch.pattern], lengths)


def _rows_of(bunches: list[_Bunch], lengths: np.ndarray) -> Bins:
    """Give each bin its rows: those of a length in their order, bunch by bunch."""
    by_length = np.argsort(lengths, kind="stable").astype(np.int32)
    next_of = np.concatenate(([0], np.cumsum(np.bincount(lengths)))) if len(lengths) else np.zeros(1, np.int64)
    widths = [sum(each for _, each in bunch.pattern) for bunch in bunches]
    sizes = np.repeat(widths, [bunch.count for bunch in bunches]).astype(np.int64)
    rows, firsts, at = np.empty(len(lengths), np.int32), np.empty(len(sizes), np.int32), 0
    first_bin = 0
    for bunch, width in zip(bunches, widths, strict=True):
        block = rows[at : at + bunch.count * width].reshape(bunch.count, width)
        column = 0
        for length, each in bunch.pattern:
            start = next_of[length]
            next_of[length] += bunch.count * each
            block[:, column : column + each] = by_length[start : next_of[length]].reshape(bunch.count, each)
            column += each
        block.sort(axis=1)
        firsts[first_bin : first_bin + bunch.count] = block[:, 0]
        at, first_bin = at + block.size, first_bin + bunch.count
    order = np.argsort(firsts, kind="stable")
    begins = (np.cumsum(sizes) - sizes)[order]
    starts = np.concatenate(([0], np.cumsum(sizes[order])))
    index = np.arange(len(rows)) - np.repeat(starts[:-1] - begins, sizes[order])
    return Bins(rows[index], starts)


def packed(path: Path, lengths: np.ndarray, capacity: int) -> Bins:
    """The bins of a prepared split's rows, kept in a file beside it; packed again where there is none that fits."""
    file = path.with_name(f"{path.stem}.packed-{capacity}.npz")
    digest = np.frombuffer(hashlib.sha256(np.ascontiguousarray(lengths, dtype=np.int64)).digest(), np.uint8)
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(file) as saved:
        if np.array_equal(saved["lengths"], digest):
            return Bins(saved["rows"], saved["starts"])
    bins = pack(lengths, capacity)
    scratch = file.with_name(f"{file.name}.{os.getpid()}.partial")  # ranks may write at the same time
    with suppress(OSError):  # a cache that cannot be written, or is full, costs the next start some seconds
        try:
            with scratch.open("wb") as sink:
                np.savez(sink, rows=bins.rows, starts=bins.starts, lengths=digest)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)
    return bins


class BlockCutter:
    """Cuts a stream of tokens into blocks of `size`, carrying each remainder on."""

    def __init__(self, size: int) -> None:
        self.size, self.rest = size, np.empty(0, np.int32)

    def cut(self, tokens: np.ndarray) -> np.ndarray:
        """The blocks that `tokens` complete: (blocks, size); `rest` is what is left."""
        tokens = np.concatenate((self.rest, tokens))
        whole = len(tokens) - len(tokens) % self.size
        self.rest = tokens[whole:].copy()
        return tokens[:whole].reshape(-1, self.size)
