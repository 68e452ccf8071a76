"""Which rows each rank takes at each step, and rows to tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dsrecipes.data.columns import Column, read_columns
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.pack import Bins, pack, packed
from dsrecipes.data.weights import WEIGHTS

PADDING_ROW = -1
"""Index of a row whose labels are all ignored; it fills a short step, where a repeated row would count twice."""
_DEALT = 16
"""Steps whose rows are dealt together by length."""
TOKEN_COUNTS = "counts"
"""Key of a batch's [useful tokens, rows]; the trainer takes it out before the model sees the batch."""
Features = dict[str, Any]


class Sequences(TorchDataset):
    """Rows as they are, or several whole ones to a sequence.

    An item is [row, ...] with row a dict of input_ids, labels and what other numbers encode gave; item PADDING_ROW has one
    row with nothing to learn from.
    """

    def __init__(self, path: Path | pa.Table, capacity: int | None = None, class_weights: np.ndarray | None = None) -> None:
        """The rows of a prepared split's file, or of a table in memory.

        Args:
            capacity: in tokens, packs; None leaves one row to a sequence.
            class_weights: in label order, multiplies the weight of each row.
        """
        self.path, self.class_weights = path, class_weights
        self.bins: Bins | None = None
        self._read_columns()
        self.lengths = self.columns["input_ids"].lengths()
        """Tokens of each sequence; of a row of several texts those of its longest."""
        if capacity is not None:
            in_memory = isinstance(path, pa.Table)
            self.bins = pack(self.lengths, capacity) if in_memory else packed(path, self.lengths, capacity)
            self.lengths = np.add.reduceat(self.lengths[self.bins.rows], self.bins.starts[:-1])

    def _read_columns(self) -> None:
        table = self.path if isinstance(self.path, pa.Table) else read_columns(self.path)
        self.columns = {
            name: Column(table.column(name)) for name in table.column_names if Column.reads(table.schema.field(name).type)
        }
        weights: Any = self.columns.pop(WEIGHTS, None)
        numbers = weights.numbers() if weights is not None else [np.ones(1, np.float32)]
        if self.class_weights is not None:
            labels = np.concatenate(self.columns["labels"].numbers())
            weights = self.class_weights[labels] * np.concatenate(numbers)
            numbers = [weights]
        self.weighted = any((part != 1).any() for part in numbers)
        """Whether rows have weights other than 1."""
        if self.weighted:
            self.columns[WEIGHTS] = weights

    def __getstate__(self) -> dict[str, Any]:
        """For data workers: what lies in a file is opened there again."""
        return {key: value for key, value in vars(self).items() if key != "columns"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._read_columns()

    @property
    def parts(self) -> dict[str, Sequences]:
        """By source, where there are several."""
        return {"": self}

    @property
    def counts(self) -> dict[str, int]:
        """Rows that an epoch draws, by source; empty where it has all rows."""
        return {}

    def row_lengths(self) -> np.ndarray:
        """Tokens of each prepared row; of a row of several texts those of its longest."""
        return self.columns["input_ids"].lengths()

    def lengths_of(self, epoch: int) -> np.ndarray:
        """Tokens of each sequence of an epoch."""
        return self.lengths

    def first_of(self, epoch: int) -> int:
        """Index of an epoch's first sequence; other than 0 where each epoch draws rows of its own."""
        return 0

    def by_file(self, rows: Iterable[int]) -> list[tuple[Path, list[int]]]:
        """Prepared rows by the file that they lie in, with their numbers there."""
        return [(self.path, list(rows))]

    def _row(self, row: int) -> Features:
        return {name: column[row] for name, column in self.columns.items()}

    def rows(self, index: int) -> list[int]:
        """Numbers of the prepared rows in a sequence; a filler has none."""
        return [] if index == PADDING_ROW else [index] if self.bins is None else self.bins[index].tolist()

    def examples(self, rows: list[int]) -> list[Features]:
        """Prepared rows by number."""
        return [self._row(row) for row in rows]

    @property
    def sample(self) -> Sequences:
        """Sequences that can be looked at: all."""
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[Features]:
        if index == PADDING_ROW:
            row = self._row(0)
            if np.issubdtype(np.asarray(row["labels"]).dtype, np.floating):
                return [{**row, "labels": np.full_like(row["labels"], np.nan)}]
            if np.ndim(row["labels"]) == 0:
                return [{**row, "labels": np.array(IGNORE)}]
            none = {WEIGHTS: np.empty(0, np.float32)} if self.weighted else {}
            return [{"input_ids": row["input_ids"][:1], "labels": np.array([IGNORE]), **none}]
        return self.examples(self.rows(index))


class StepSampler:
    """Index batches of one rank; the rows of a step depend on seed, epoch and step alone.

    A step's `micro x accumulation x world` rows are laid out as (accumulation, rank, micro), so the same rows meet
    in a step however they are divided. So that the rows of a micro batch, and of all ranks' at a time, are about as
    long, the shuffled rows of 16 steps are sorted by length and cut into quarters of a step: each step gets one drawn
    from the longest, one from the next, and so on. So each step is as likely as any other to get a row, and has long and
    short ones. Inside a step rows are sorted by length. Without shuffling the whole data are sorted. The last step of
    an epoch is filled with PADDING_ROW.
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
        """`data` gives the lengths and numbers of later epochs, where they are not those of the first."""
        self.data = data
        self.lengths, self.shape, self.rank = np.append(lengths, 0), (accumulation, world, micro), rank
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.steps = -(-len(lengths) // (accumulation * world * micro))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass takes."""
        self.epoch = epoch
        if self.data is not None:
            self.lengths = np.append(self.data.lengths_of(epoch), 0)

    def __len__(self) -> int:
        return self.steps * self.shape[0]

    def order(self) -> np.ndarray:
        """Row numbers of the epoch, all ranks': (steps, accumulation x world x micro)."""
        rows = len(self.lengths) - 1
        order = np.full(self.steps * int(np.prod(self.shape)), PADDING_ROW)
        if self.shuffle:
            draw = np.random.default_rng((self.seed, self.epoch))
            order[:rows] = draw.permutation(rows)
            self._deal(order[: rows - rows % (len(order) // self.steps)], len(order) // self.steps, draw)
        else:
            order[:rows] = self._longest_first(np.arange(rows))
        steps = order.reshape(self.steps, -1)
        steps = np.take_along_axis(steps, np.argsort(-self.lengths[steps], axis=1, kind="stable"), axis=1)
        first = self.data.first_of(self.epoch) if self.data is not None else 0
        return np.where(steps == PADDING_ROW, PADDING_ROW, steps + first)

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.lengths[rows], kind="stable")]  # lengths[PADDING_ROW] is the 0 at the end

    def _deal(self, order: np.ndarray, step: int, draw: np.random.Generator) -> None:
        """Deal rows of near lengths together to whole steps of `step` rows, in place."""
        parts = next((parts for parts in (4, 2) if step % parts == 0), step)
        for start in range(0, len(order), _DEALT * step):
            hand = self._longest_first(order[start : start + _DEALT * step]).reshape(parts, -1, step // parts)
            dealt = np.stack([draw.permutation(of_a_length) for of_a_length in hand], axis=1)
            order[start : start + dealt.size] = dealt.ravel()

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.order():
            yield from step.reshape(self.shape)[:, self.rank].tolist()


class StepLoader(DataLoader):
    """A DataLoader over a StepSampler that passes the epoch on."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer at the start of each epoch."""
        self.batch_sampler.set_epoch(epoch)


class CausalCollator:
    """Sequences to a causal LM's batch, with logits asked for only where a label is.

    No attention_mask: padding stands behind the text, where no text position looks, and position ids that restart
    keep packed examples apart on every attention backend but flash attention, which reads them only in a batch of
    one. Shapes: input_ids, position_ids and logits_to_keep (batch, length), shift_labels, labels and, where rows have
    them, weights (number of labels,), counts (2,).
    """

    def __init__(self, pad_id: int, select_logits: bool, flash: bool = False) -> None:
        """Set what a batch holds.

        Args:
            pad_id: fills the end of a shorter sequence.
            select_logits: False keeps all positions, for a model without logits_to_keep.
            flash: whether the batch holds the boundaries of examples for flash attention; other backends ignore them.
        """
        self.pad_id, self.select_logits, self.flash = pad_id, select_logits, flash

    def __call__(self, items: list[list[Features]]) -> dict[str, torch.Tensor]:
        width = max(sum(len(row["input_ids"]) for row in item) for item in items)
        ids = np.full((len(items), width), self.pad_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        targets = np.full_like(ids, IGNORE)
        weights = np.ones(ids.shape, dtype=np.float32) if WEIGHTS in items[0][0] else None
        tokens = rows = 0
        for line, item in enumerate(items):
            start = 0
            for row in item:
                end = start + len(row["input_ids"])
                ids[line, start:end] = row["input_ids"]
                positions[line, start:end] = np.arange(end - start)
                targets[line, start : end - 1] = row["labels"][1:]
                if weights is not None and len(row[WEIGHTS]):
                    weights[line, start : end - 1] = row[WEIGHTS][1:]
                if (row["labels"] != IGNORE).any():
                    tokens, rows = tokens + end - start, rows + 1
                start = end
            # one example goes on counting into the padding, so that attention stays plainly causal; after several,
            # the padding is a further example
            positions[line, start:] = np.arange(width - start) + (start if len(item) == 1 else 0)
        keep = torch.from_numpy(targets != IGNORE)
        shift_labels = torch.from_numpy(targets)[keep] if self.select_logits else torch.from_numpy(targets)
        batch = {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "labels": shift_labels,
            "shift_labels": shift_labels,
            TOKEN_COUNTS: torch.tensor([tokens, rows]),
        }
        if self.select_logits:
            batch["logits_to_keep"] = keep
        if weights is not None:
            values = torch.from_numpy(weights)
            batch[WEIGHTS] = values[keep] if self.select_logits else values * keep
        return batch | segments(batch["position_ids"]) if self.flash else batch


def segments(position_ids: torch.Tensor) -> dict[str, Any]:
    """Boundaries of the examples in the flattened micro batch, as flash attention takes them (FlashAttentionKwargs).

    Without them flash attention treats each row of a micro batch above one as a single example, whatever its positions.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """Where there is something to learn, by row for numbers: a filler has NaN, for IGNORE may be a number that is meant."""
    if not labels.is_floating_point():
        return labels != IGNORE
    return ~labels.reshape(len(labels), -1).isnan().any(1)


class PaddingCollator:
    """Rows with one label each (classification, multiple choice) to a batch padded to its longest text.

    input_ids, attention_mask and other token fields: (batch, length) or (batch, choices, length). labels: (batch,) class
    numbers or, in float32, numbers; (batch, classes) of 0 and 1 in float32 for rows with several labels. weights, where
    rows have them: (batch,).
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: list[list[Features]]) -> dict[str, torch.Tensor]:
        rows = [row for item in items for row in item]
        nested = isinstance(rows[0]["input_ids"][0], (np.ndarray, list))
        texts: Callable[[Features, str], list] = lambda row, name: list(row[name]) if nested else [row[name]]  # noqa: E731
        width = max(len(text) for row in rows for text in texts(row, "input_ids"))
        names = [name for name in rows[0] if name != "labels" and np.ndim(rows[0][name])]
        batch = {}
        for name in names:
            fill = self.pad_id if name == "input_ids" else 0
            padded = [[[*text, *[fill] * (width - len(text))] for text in texts(row, name)] for row in rows]
            batch[name] = torch.tensor(
                np.array(padded, dtype=np.int64) if nested else np.array(padded, dtype=np.int64)[:, 0]
            )
        mask = [[[1] * len(text) + [0] * (width - len(text)) for text in texts(row, "input_ids")] for row in rows]
        batch["attention_mask"] = torch.tensor(mask if nested else [line[0] for line in mask])
        labels = np.array([row["labels"] for row in rows])
        is_number = np.issubdtype(labels.dtype, np.floating)
        batch["labels"] = torch.from_numpy(labels.astype(np.float32 if is_number else np.int64))
        real = labelled(batch["labels"])
        batch[TOKEN_COUNTS] = torch.stack([batch["attention_mask"][real].sum(), real.sum()])
        if WEIGHTS in rows[0]:
            batch[WEIGHTS] = torch.tensor([float(row[WEIGHTS]) for row in rows]) * real
        return batch
