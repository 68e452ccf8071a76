"""Which rows of each data set does an epoch have? Shares of sources, and the draws that follow from them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsrecipes.config.sources import Source
from dsrecipes.data.pack import pack
from dsrecipes.data.sequences import PADDING_ROW, Features, Sequences
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import UserError


def rows_by_epoch(sources: list[Source], available: dict[str, int]) -> dict[str, int] | None:
    """Compute the number of rows that each source contributes to an epoch.

    `rows` is taken as it is. The other sources share as many rows as they hold together in proportion to their `weight`, which
    is 1 where only others have one, rounded by the largest remainder. Where no source has a weight, each contributes all rows.

    Args:
        sources: with their shares.
        available: rows by the name of the source.

    Returns:
        Rows by the name of the source; None without any shares: all rows of each source, once.

    Raises:
        UserError: a weight is too small for a single row.
    """
    if not any(source.rows or source.weight for source in sources):
        return None
    counts = {source.name: source.rows or available[source.name] for source in sources}
    weighted = [source for source in sources if not source.rows]
    if not any(source.weight for source in weighted):
        return counts
    # largest remainder: round all down, then give the missing rows to the largest fractions, so that the sum is exact
    weights = np.array([source.weight or 1.0 for source in weighted])
    total = sum(available[source.name] for source in weighted)
    exact = total * weights / weights.sum()
    rounded = np.floor(exact).astype(int)
    by_remainder = np.argsort(rounded - exact, kind="stable")
    rounded[by_remainder[: total - rounded.sum()]] += 1
    for source, count in zip(weighted, rounded.tolist(), strict=True):
        if not count:
            raise UserError(
                "DSR161",
                f"{source.path}: weight {source.weight or 1:g} is less than one of the {total:,} rows of an epoch: raise it, "
                "or leave the data set out",
            )
        counts[source.name] = count
    return counts


def draws(rows: int, count: int, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the rows of one source in epoch after epoch, without end.

    An epoch has all rows as often as `count` allows. The rest is drawn without replacement, across epochs too: no row occurs a
    second time before every row has occurred once.

    Args:
        rows: of the source.
        count: rows of an epoch.
        seed: of the draws.
    """
    passes, rest = divmod(count, rows)
    complete = np.tile(np.arange(rows), passes)
    waiting, shuffles = np.empty(0, dtype=np.int64), 0
    while True:
        chosen, waiting = waiting[:rest], waiting[rest:]
        if len(chosen) < rest:
            shuffled = np.random.default_rng((*seed, shuffles)).permutation(rows)
            shuffles += 1
            # rows that this epoch already has go to the end, so that no epoch draws a row twice
            used = np.isin(shuffled, chosen)
            shuffled = np.concatenate([shuffled[~used], shuffled[used]])
            missing = rest - len(chosen)
            chosen, waiting = np.concatenate([chosen, shuffled[:missing]]), shuffled[missing:]
        yield np.concatenate([complete, chosen])


class JoinedSequences(Sequences):
    """Sequences of several sources, one source after another, with one numbering of rows."""

    def __init__(self, parts: dict[str, Sequences]) -> None:
        """Join `parts`, by the name of the source."""
        self._parts = parts
        self.weighted = any(part.weighted for part in parts.values())
        self.class_weights = next(iter(parts.values())).class_weights
        self._first_row = np.cumsum([0, *(len(part.row_lengths()) for part in parts.values())])
        self._first = np.cumsum([0, *map(len, parts.values())])
        self.lengths = np.concatenate([part.lengths for part in parts.values()])

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes: the parts pickle themselves without their memory maps."""
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def parts(self) -> dict[str, Sequences]:
        """The sequences by the name of the source."""
        return self._parts

    def row_lengths(self) -> np.ndarray:
        """Tokens of each prepared row."""
        return np.concatenate([part.row_lengths() for part in self._parts.values()])

    def by_file(self, rows: Iterable[int]) -> list[tuple[Path, list[int]]]:
        """Group prepared rows by their file, with their numbers in it."""
        files: dict[Path, list[int]] = {}
        for row in rows:
            part, number = self._located(row, self._first_row)
            files.setdefault(part.path, []).append(number)
        return list(files.items())

    def _located(self, number: int, firsts: np.ndarray) -> tuple[Sequences, int]:
        """Find the source of a row or sequence, and its number there; `firsts` are the first numbers of the sources."""
        part = int(np.searchsorted(firsts, number, side="right")) - 1
        return list(self._parts.values())[part], int(number - firsts[part])

    def _row(self, row: int) -> Features:
        part, number = self._located(row, self._first_row)
        (features,) = part.examples([number])
        if self.weighted and WEIGHTS not in features:  # all rows of this source weigh 1, and those of others do not
            labels = np.asarray(features["labels"])  # integers by token; several labels of one row are floats
            by_token = labels.ndim and np.issubdtype(labels.dtype, np.integer)
            features[WEIGHTS] = np.empty(0, np.float32) if by_token else np.float32(1)
        return features

    def rows(self, index: int) -> list[int]:
        """Numbers of the prepared rows in a sequence; a padding row has none."""
        if index == PADDING_ROW:
            return []
        source = int(np.searchsorted(self._first, index, side="right")) - 1
        part, number = self._located(index, self._first)
        return [int(self._first_row[source]) + row for row in part.rows(number)]


class Mixture(JoinedSequences):
    """Rows drawn from several sources, different ones in each epoch; a function of seed and epoch alone.

    The numbering of sequences continues across epochs: index = epoch x sequences of an epoch + position in it. So a persistent
    data worker need not be notified of a new epoch.
    """

    def __init__(self, parts: dict[str, Sequences], counts: dict[str, int], capacity: int | None, seed: int) -> None:
        """Draw and pack the first epoch.

        Args:
            parts: one row to a sequence, by the name of the source.
            counts: rows of an epoch by source.
            capacity: tokens of a packed sequence; None leaves one row to a sequence.
            seed: of the draws.
        """
        super().__init__(parts)
        self._counts, self._capacity, self._seed = counts, capacity, seed
        self._tokens = self.lengths
        self._drawn: tuple[int, list[Iterator[np.ndarray]]] = (0, [])
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._per_epoch = 0
        self.fix_length(1, 1, 0)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the iterators, which are restarted after unpickling."""
        return vars(self) | {"_drawn": (0, [])}

    @property
    def counts(self) -> dict[str, int]:
        """Rows that an epoch draws, by source."""
        return self._counts

    def fix_length(self, batch: int, epochs: float, max_steps: int) -> None:
        """Give every epoch of the run the same number of sequences, because Trainer counts the steps of the first one only.

        That is the number of the epoch that packs worst, rounded up to full steps where there are enough rows; in the other
        epochs the sequences with the most rows are cut in two.

        Args:
            batch: sequences of a step.
            epochs: length of the run, where `max_steps` is not above 0.
            max_steps: length of the run in steps.
        """
        rows = sum(self.counts.values())
        if self._capacity is None:
            self._per_epoch = rows
        else:
            most = self._most_sequences(batch, epochs, max_steps)
            self._per_epoch = min(rows, math.ceil(most / batch) * batch)
        self._epoch = None
        self.lengths = self.lengths_of(0)

    def _most_sequences(self, batch: int, epochs: float, max_steps: int) -> int:
        """Count the sequences of the epoch that packs worst."""
        # with --max_steps the number of epochs depends on the result: more sequences to an epoch, fewer epochs to look at
        most = epoch = 0
        while True:
            last = math.ceil(epochs)
            if max_steps > 0 and most:
                last = math.ceil(max_steps / math.ceil(most / batch))
            if epoch >= last:
                return most
            most, epoch = max(most, len(self._packed(epoch)[1])), epoch + 1

    def lengths_of(self, epoch: int) -> np.ndarray:
        """Tokens of each sequence of an epoch."""
        rows, ends = self._layout(epoch)
        return np.add.reduceat(self._tokens[rows], np.append(0, ends[:-1]))

    def first_of(self, epoch: int) -> int:
        """Index of an epoch's first sequence."""
        return epoch * self._per_epoch

    def rows(self, index: int) -> list[int]:
        """Numbers of the prepared rows in a sequence; a padding row has none."""
        if index == PADDING_ROW:
            return []
        epoch, position = divmod(index, self._per_epoch)
        rows, ends = self._layout(epoch)
        start = ends[position - 1] if position else 0
        return rows[start : ends[position]].tolist()

    def drawn(self, epoch: int) -> list[np.ndarray]:
        """Return the rows that an epoch has of each source, by their numbers there."""
        # an epoch depends on all draws before it, so an earlier epoch than the last one starts again from the first
        following, iterators = self._drawn
        if following > epoch or not iterators:
            following = 0
            # crc32, because hash() of a text differs from process to process; a seed by name, so that another source in the
            # list does not change the draws of this one
            iterators = [
                draws(len(part), self.counts[name], (self._seed, zlib.crc32(name.encode())))
                for name, part in self._parts.items()
            ]
        for _ in range(following, epoch + 1):
            rows = [next(iterator) for iterator in iterators]
        self._drawn = (epoch + 1, iterators)
        return rows

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of an epoch in the order of its sequences, and where each sequence ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            rows, ends = self._packed(epoch)
            self._epoch = (epoch, rows, cut_to(ends, self._per_epoch))
        return self._epoch[1:]

    def _packed(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the layout of an epoch before its number of sequences is fixed."""
        drawn = np.concatenate([first + rows for first, rows in zip(self._first_row, self.drawn(epoch), strict=False)])
        rows = np.random.default_rng((self._seed, epoch)).permutation(drawn)
        if self._capacity is None:
            return rows, np.arange(1, len(rows) + 1)
        bins = pack(self._tokens[rows], self._capacity)
        return rows[bins.rows], bins.starts[1:]


def cut_to(ends: np.ndarray, count: int) -> np.ndarray:
    """Cut sequences of several rows in two, those with the most rows first, until there are `count` of them.

    Args:
        ends: where each sequence ends in the order of rows.
        count: at most the number of rows.
    """
    # several rounds, because a sequence can only be cut in two in each
    while len(ends) < count:
        sizes = np.diff(ends, prepend=0)
        longest = np.argsort(-sizes, kind="stable")[: count - len(ends)]
        longest = longest[sizes[longest] > 1]
        ends = np.sort(np.append(ends, ends[longest] - sizes[longest] // 2))
    return ends
