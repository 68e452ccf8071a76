"""Whole examples into sequences of max_length (best-fit decreasing), and token streams into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[np.ndarray]:
    """Put examples into as few bins as best-fit decreasing finds; a function of the lengths alone.

    Best-fit decreasing (Johnson 1973): longest first, each into the fullest bin that still holds it. As lengths are
    whole numbers up to `capacity`, bins are kept by free space, which makes it linear in examples x capacity/64.

    Args:
        lengths: tokens of each example, none above `capacity`.
        capacity: tokens of a bin.

    Returns:
        Bins of example indices, ascending inside a bin and by first index among bins.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    filled = 0  # bit s is set where a bin with s free tokens exists
    bins: list[list[int]] = []
    for index in order:
        length = int(lengths[index])
        fits = filled >> length
        if fits:
            space = length + (fits & -fits).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                filled ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(int(index))
        by_space[space - length].append(chosen)
        filled |= 1 << (space - length)
    return sorted((np.sort(np.array(each)) for each in bins), key=lambda each: each[0])


def blocks(streams: Iterable[list[int]], size: int) -> Iterator[list[int]]:
    """Cut a stream of token lists into lists of `size`, carrying each remainder on; the last one may be shorter."""
    rest: list[int] = []
    for tokens in streams:
        rest += tokens
        cut = len(rest) - len(rest) % size
        for start in range(0, cut, size):
            yield rest[start : start + size]
        rest = rest[cut:]
    if rest:
        yield rest
