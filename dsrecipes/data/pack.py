"""How are rows packed? Whole rows into sequences of max_length (best-fit decreasing), and token streams into blocks."""

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
    """Row numbers by bin, in two flat arrays: millions of small arrays would take gigabytes."""

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
    """Bins filled with the same lengths, which are handled as one."""

    count: int
    pattern: tuple[tuple[int, int], ...] = ()
    """(length, number of rows of this length) in each bin."""


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> Bins:
    """Pack rows into as few bins as best-fit decreasing finds; a function of the lengths alone.

    Best-fit decreasing (Johnson 1973) takes the longest row first, and puts each into the fullest bin that still holds it. As
    lengths are integers up to `capacity`, the rows of a length are put into all bins with the same free space at once: millions
    of rows take about as many operations as there are pairs of length and space.

    Args:
        lengths: tokens of each row, none above `capacity`.
        capacity: tokens of a bin.

    Returns:
        Bins of row numbers, ordered by their first number.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    by_space: dict[int, list[_Bunch]] = {}
    # bit s is set where a bin with s free tokens exists: the lowest bit from `length` on is the fullest bin that fits
    filled = 0
    # longest first: short rows fill the gaps that long ones leave
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
            # the fullest bin that holds a row stays the fullest one until it holds no further row of this length
            per_bin = min(space // length if length else left, left)
            count = min(bunch.count, left // per_bin)
            if bunch.count > count:
                by_space.setdefault(space, []).append(_Bunch(bunch.count - count, bunch.pattern))
            elif fits and not by_space[space]:
                filled ^= 1 << space
            remaining = space - per_bin * length
            by_space.setdefault(remaining, []).append(_Bunch(count, (*bunch.pattern, (length, per_bin))))
            filled |= 1 << remaining
            left -= count * per_bin
    return _rows_of([bunch for space in sorted(by_space) for bunch in by_space[space] if bunch.pattern], lengths)


def _rows_of(bunches: list[_Bunch], lengths: np.ndarray) -> Bins:
    """Assign row numbers to the bins: the rows of a length in their order, bunch by bunch."""
    by_length = np.argsort(lengths, kind="stable").astype(np.int32)
    next_of = np.concatenate(([0], np.cumsum(np.bincount(lengths)))) if len(lengths) else np.zeros(1, np.int64)
    widths = [sum(per_bin for _, per_bin in bunch.pattern) for bunch in bunches]
    sizes = np.repeat(widths, [bunch.count for bunch in bunches]).astype(np.int64)
    rows, firsts, at = np.empty(len(lengths), np.int32), np.empty(len(sizes), np.int32), 0
    first_bin = 0
    for bunch, width in zip(bunches, widths, strict=True):
        block = rows[at : at + bunch.count * width].reshape(bunch.count, width)
        column = 0
        for length, per_bin in bunch.pattern:
            start = next_of[length]
            next_of[length] += bunch.count * per_bin
            block[:, column : column + per_bin] = by_length[start : next_of[length]].reshape(bunch.count, per_bin)
            column += per_bin
        block.sort(axis=1)
        firsts[first_bin : first_bin + bunch.count] = block[:, 0]
        at, first_bin = at + block.size, first_bin + bunch.count
    order = np.argsort(firsts, kind="stable")
    begins = (np.cumsum(sizes) - sizes)[order]
    starts = np.concatenate(([0], np.cumsum(sizes[order])))
    index = np.arange(len(rows)) - np.repeat(starts[:-1] - begins, sizes[order])
    return Bins(rows[index], starts)


def packed(path: Path, lengths: np.ndarray, capacity: int) -> Bins:
    """Return the bins of a prepared split's rows, from a file next to it if that fits, else packed and written there."""
    # the file is found by its name and trusted by the hash of the lengths: another version may have prepared other rows here
    file = path.with_name(f"{path.stem}.packed-{capacity}.npz")
    digest = np.frombuffer(hashlib.sha256(np.ascontiguousarray(lengths, dtype=np.int64).data).digest(), np.uint8)
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(file) as saved:
        if np.array_equal(saved["lengths"], digest):
            return Bins(saved["rows"], saved["starts"])
    bins = pack(lengths, capacity)
    scratch = file.with_name(f"{file.name}.{os.getpid()}.partial")  # ranks may write at the same time
    with suppress(OSError):  # without the file the next start takes some seconds longer
        try:
            with scratch.open("wb") as sink:
                np.savez(sink, rows=bins.rows, starts=bins.starts, lengths=digest)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)
    return bins


class BlockCutter:
    """Cuts a stream of tokens into blocks of `size`; a remainder begins the next block."""

    def __init__(self, size: int) -> None:
        self.size, self.rest = size, np.empty(0, np.int32)

    def cut(self, tokens: np.ndarray) -> np.ndarray:
        """Return the blocks that `tokens` complete, of shape (blocks, size); `rest` is what is left."""
        tokens = np.concatenate((self.rest, tokens))
        end = len(tokens) - len(tokens) % self.size
        # a copy, because a view would keep all tokens of the call in memory
        self.rest = tokens[end:].copy()
        return tokens[:end].reshape(-1, self.size)
