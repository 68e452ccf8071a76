"""What is a training sequence? One prepared row, or several packed into one.

Rows are read from the memory-mapped file when they are needed, and packed by number: packing copies no token.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset as TorchDataset

from dsrecipes.data.columns import Column, read_columns
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.pack import Bins, pack, packed
from dsrecipes.data.weights import WEIGHTS

PADDING_ROW = -1
"""Index of a row whose labels are all ignored. It fills up a short step, where a repeated row would count twice."""
Features = dict[str, Any]
"""A row as numpy arrays and numbers, by column."""


class Sequences(TorchDataset):
    """The sequences of a prepared split: single rows, or several complete rows packed into each.

    An item is [row, ...], where a row is a dict of input_ids, labels and the other numbers that encode returned. The item of
    index PADDING_ROW has one row that nothing is learned from.
    """

    def __init__(self, path: Path | pa.Table, capacity: int | None = None, class_weights: np.ndarray | None = None) -> None:
        """Open the rows of a prepared split's file, or of a table in memory.

        Args:
            path: the file or table.
            capacity: tokens of a packed sequence; None leaves one row to a sequence.
            class_weights: in label order; multiply the weight of each row.
        """
        self.table = path if isinstance(path, pa.Table) else None
        self.path = Path() if isinstance(path, pa.Table) else path
        self.class_weights = class_weights
        self.bins: Bins | None = None
        self._read_columns()
        self.lengths: np.ndarray = self.columns["input_ids"].lengths()
        """Tokens of each sequence; of a row of several texts those of its longest."""
        if capacity is not None:
            # the bins of a file are stored next to it, because packing millions of rows takes seconds at each start
            in_memory = self.table is not None
            self.bins = pack(self.lengths, capacity) if in_memory else packed(self.path, self.lengths, capacity)
            self.lengths = np.add.reduceat(self.lengths[self.bins.rows], self.bins.starts[:-1])

    def _read_columns(self) -> None:
        table = read_columns(self.path) if self.table is None else self.table
        self.columns: dict[str, Any] = {
            name: Column(table.column(name)) for name in table.column_names if Column.reads(table.schema.field(name).type)
        }
        weights: Any = self.columns.pop(WEIGHTS, None)
        # weights that are all 1 are left out, so that runs without weights take the faster path of the loss
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
        """Leave out the columns: a data worker maps the file itself, instead of getting a copy of all tokens."""
        return {key: value for key, value in vars(self).items() if key != "columns"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._read_columns()

    @property
    def parts(self) -> dict[str, Sequences]:
        """The sequences by source, where there are several sources."""
        return {"": self}

    @property
    def counts(self) -> dict[str, int]:
        """Rows that an epoch draws, by source; empty where an epoch has all rows."""
        return {}

    def row_lengths(self) -> np.ndarray:
        """Tokens of each prepared row; of a row of several texts those of its longest."""
        return self.columns["input_ids"].lengths()

    def lengths_of(self, epoch: int) -> np.ndarray:
        """Tokens of each sequence of an epoch."""
        return self.lengths

    def first_of(self, epoch: int) -> int:
        """Index of an epoch's first sequence; not 0 where each epoch draws rows of its own."""
        return 0

    def by_file(self, rows: Iterable[int]) -> list[tuple[Path, list[int]]]:
        """Group prepared rows by their file, with their numbers in it."""
        return [(self.path, list(rows))]

    def _row(self, row: int) -> Features:
        return {name: column[row] for name, column in self.columns.items()}

    def rows(self, index: int) -> list[int]:
        """Numbers of the prepared rows in a sequence; a padding row has none."""
        if index == PADDING_ROW:
            return []
        return [index] if self.bins is None else self.bins[index].tolist()

    def examples(self, rows: Iterable[int]) -> list[Features]:
        """Prepared rows by number."""
        return [self._row(row) for row in rows]

    @property
    def sample(self) -> Sequences:
        """Sequences that checks may look at: all of them here."""
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[Features]:
        return [self._padding_row()] if index == PADDING_ROW else self.examples(self.rows(index))

    def _padding_row(self) -> Features:
        """Build a row like the first one, without a label to learn."""
        row = self._row(0)
        if np.issubdtype(np.asarray(row["labels"]).dtype, np.floating):
            return {**row, "labels": np.full_like(row["labels"], np.nan)}  # -100 could be a number that is meant
        if np.ndim(row["labels"]) == 0:
            return {**row, "labels": np.array(IGNORE)}
        weights = {WEIGHTS: np.empty(0, np.float32)} if self.weighted else {}
        # one token is enough: the batch is padded to its longest row anyway
        return {"input_ids": row["input_ids"][:1], "labels": np.array([IGNORE]), **weights}
