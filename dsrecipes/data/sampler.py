"""Which rows does a rank take at each step?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from dsrecipes.data.sequences import PADDING_ROW, Sequences

_BUCKET_STEPS = 16
"""Steps whose rows are sorted by length together: enough for even lengths, few enough to stay close to a random order."""


class StepSampler:
    """Yields index batches of one rank; the rows of a step depend on seed, epoch and step alone.

    The `micro x accumulation x world` rows of a step are laid out as (accumulation, rank, micro), so that the same rows are
    in a step whatever the number of ranks.

    Length bucketing: the rows of a micro batch, and those that all ranks work on at a time, should have about the same length.
    So the shuffled rows of 16 steps are sorted by length and cut into quarters of a step, and each step gets one quarter drawn
    from the longest, one from the next, and so on. A row is then equally likely in each step, and every step has long and short
    rows. Inside a step rows are sorted by length. Without shuffling all rows are sorted by length. The last step of an epoch is
    filled with PADDING_ROW.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        micro: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        data: Sequences | None = None,
    ) -> None:
        """Lay out the steps.

        Args:
            lengths: tokens of each sequence of the first epoch.
            micro: sequences of a micro batch.
            accumulation: micro batches of a rank in a step.
            rank: whose batches are yielded.
            world: number of ranks.
            seed: of the shuffling.
            shuffle: False sorts by length instead.
            data: gives the lengths and first indices of later epochs, where they differ from the first epoch's.
        """
        self.data = data
        self.lengths = np.append(lengths, 0)  # the 0 is the length of PADDING_ROW, which is index -1
        self.shape, self.rank = (accumulation, world, micro), rank
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.steps = -(-len(lengths) // (accumulation * world * micro))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch
        if self.data is not None:
            self.lengths = np.append(self.data.lengths_of(epoch), 0)

    def __len__(self) -> int:
        return self.steps * self.shape[0]

    def order(self) -> np.ndarray:
        """Sequences of the epoch for all ranks, of shape (steps, accumulation x world x micro)."""
        rows = len(self.lengths) - 1
        order = np.full(self.steps * int(np.prod(self.shape)), PADDING_ROW)
        if self.shuffle:
            generator = np.random.default_rng((self.seed, self.epoch))
            # seeded by epoch and not drawn on: a resumed run gets the order of its epoch without replaying earlier ones
            order[:rows] = generator.permutation(rows)
            per_step = len(order) // self.steps
            # the last step of an epoch is left out, because its padding rows have no length to sort by
            self._bucket_by_length(order[: rows - rows % per_step], per_step, generator)
        else:
            order[:rows] = self._longest_first(np.arange(rows))
        steps = order.reshape(self.steps, -1)
        steps = np.take_along_axis(steps, np.argsort(-self.lengths[steps], axis=1, kind="stable"), axis=1)
        first = self.data.first_of(self.epoch) if self.data is not None else 0
        return np.where(steps == PADDING_ROW, PADDING_ROW, steps + first)

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.lengths[rows], kind="stable")]

    def _bucket_by_length(self, order: np.ndarray, per_step: int, generator: np.random.Generator) -> None:
        """Give each step an equal part of the long and of the short rows; changes `order`, which holds whole steps."""
        # quarters where they divide a step evenly, else halves; otherwise each row is a part
        parts = next((parts for parts in (4, 2) if per_step % parts == 0), per_step)
        for start in range(0, len(order), _BUCKET_STEPS * per_step):
            rows = self._longest_first(order[start : start + _BUCKET_STEPS * per_step])
            buckets = rows.reshape(parts, -1, per_step // parts)
            steps = np.stack([generator.permutation(bucket) for bucket in buckets], axis=1)
            order[start : start + steps.size] = steps.ravel()

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.order():
            yield from step.reshape(self.shape)[:, self.rank].tolist()


class StreamSampler:
    """Yields ordinals of a stream for one rank, laid out as by StepSampler: (accumulation, rank, micro) in each step."""

    def __init__(self, steps: int, shape: tuple[int, int, int], rank: int) -> None:
        """Lay out `steps` steps of shape (accumulation, ranks, micro batch)."""
        self.steps, self.shape, self.rank = steps, shape, rank

    def set_epoch(self, epoch: int) -> None:
        """Ignored: for Trainer a whole streamed run is one epoch."""

    def __len__(self) -> int:
        return self.steps * self.shape[0]

    def __iter__(self) -> Iterator[list[int]]:
        positions = np.arange(int(np.prod(self.shape))).reshape(self.shape)
        for step in range(self.steps):
            yield from (step * positions.size + positions[:, self.rank]).tolist()


class StepLoader(DataLoader):
    """A DataLoader that passes the epoch on to its StepSampler."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer at the start of each epoch."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)
