"""Paired comparison of two measurements of the same items."""

from __future__ import annotations

from math import comb

import numpy as np

_CHUNK = 1 << 22
"""Numbers drawn at a time."""


def paired_interval(
    differences: np.ndarray, weights: np.ndarray, *, seed: int = 0, samples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(differences) / sum(weights) over the items drawn anew (Efron 1979).

    Args:
        differences: second minus first of each item; sums where an item weighs more than one.
        weights: 1 for each item, or its number of tokens.
        samples: how often the items are drawn, as many as there are, with replacement.
    """
    draw, count = np.random.default_rng(seed), len(differences)
    step = max(1, _CHUNK // count)
    means = []
    for begin in range(0, samples, step):
        drawn = draw.integers(count, size=(min(step, samples - begin), count))
        means.append(differences[drawn].sum(1) / weights[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p value of McNemar's test (1947): items that only one of two got right, as throws of a fair coin."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
