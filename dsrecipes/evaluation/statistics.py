"""Is the difference of two measurements of the same items more than chance?"""

from __future__ import annotations

from math import comb

import numpy as np

_CHUNK = 1 << 22
"""Random numbers in memory at a time."""


def paired_interval(
    differences: np.ndarray,
    weights: np.ndarray,
    *,
    against: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
    samples: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(differences) / sum(weights) over resampled items (Efron 1979).

    Args:
        differences: (items,), second minus first; a sum where an item weighs more than one.
        weights: (items,): 1, or the item's number of tokens.
        against: values and weights (items,) of the first, where its weights are others; `differences` and `weights` are then
            the second's alone, and the mean of the first is subtracted from theirs.
        seed: of the resampling.
        samples: resamples, each of as many items as there are, with replacement.
        level: the interval's coverage.
    """
    random, count = np.random.default_rng(seed), len(differences)
    step = max(1, _CHUNK // count)
    means = []
    for begin in range(0, samples, step):
        chosen = random.integers(count, size=(min(step, samples - begin), count))
        mean = differences[chosen].sum(1) / weights[chosen].sum(1)
        if against is not None:
            mean -= against[0][chosen].sum(1) / against[1][chosen].sum(1)
        means.append(mean)
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p value of McNemar's test (1947).

    Items that only one of two models got right are, without a difference, throws of a fair coin.

    Args:
        only_first: items that only the first got right.
        only_second: items that only the second got right.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    # Whole numbers up to the division: a term overflows a float from about 1000 items on.
    tail = sum(comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
