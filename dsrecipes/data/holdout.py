"""Which training rows are held out for validation?

The choice is a function of the records' hashes, the share and the seed, so that it is the same on every rank, in a resumed run
and in `dsrecipes evaluate`. Equal records are always on the same side: otherwise a run would be validated on rows that it was
trained on.
"""

from __future__ import annotations

import random
from array import array
from typing import Protocol

import numpy as np


class HoldOut(Protocol):
    """A function that chooses the held-out records."""

    __name__: str

    def __call__(self, keys: np.ndarray, share: float, seed: int) -> np.ndarray:
        """Return True for each record that is held out."""


def hold_out(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose about `share` of the records, with a seed; records with equal keys are on the same side.

    Args:
        keys: record_hash of each record (uint64). Among millions of records two different ones seldom share a key, and
            then they only stay on the same side.
        share: between 0 and 1.
        seed: of the choice.

    Returns:
        True for each chosen record; all False where there are fewer than two different records.
    """
    # the choice is drawn over different records, in the order of their keys: so the order of the rows does not change it
    ordered = np.sort(keys)
    is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(keys)]
    firsts = np.flatnonzero(is_first).astype(np.int32)
    if len(firsts) < 2:
        return np.zeros(len(keys), bool)
    # Python's shuffle and not numpy's: earlier versions drew with it, and `evaluate` must find the rows that they held out
    order = array("i", range(len(firsts)))
    random.Random(seed).shuffle(order)
    shuffled = np.frombuffer(order, np.int32)[:-1]  # one record always stays
    copies = np.diff(firsts, append=np.int32(len(keys)))[shuffled]
    # whole groups of equal records are taken until the share is reached
    enough = int(np.searchsorted(np.cumsum(copies), max(1, round(share * len(keys))))) + 1
    chosen = np.sort(ordered[firsts[shuffled[:enough]]])
    return chosen[np.searchsorted(chosen, keys).clip(max=len(chosen) - 1)] == keys


def hold_out_alone(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose as hold_out does, but decide for each record alone: equal records of several data sets are on the same side.

    The share is met on average. Where there are two different records, at least one is held out and one stays.
    """
    if not len(keys) or keys.min() == keys.max():
        return np.zeros(len(keys), bool)
    # a hash xor a random number is uniform, so a threshold chooses a share without knowing the other data sets
    drawn = keys ^ np.uint64(random.Random(seed).getrandbits(64))
    limit = np.clip(np.uint64(share * 2.0**64), drawn.min(), drawn.max() - np.uint64(1))
    return drawn <= limit
