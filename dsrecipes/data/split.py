"""What does a prepared split hold, and what became of its rows?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dsrecipes.data.chunk import Chunk
from dsrecipes.data.columns import view
from dsrecipes.data.row import Row
from dsrecipes.data.usage import ColumnUsage
from dsrecipes.data.weights import WEIGHTS, other_weights
from dsrecipes.errors import UserError, plural

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class SplitStats:
    """Counts over the rows of a split; tokens are counted before packing and without padding.

    They are stored as stats.json in the cache, and as data.json in the run folder.
    """

    rows: int = 0
    """Rows that format_row accepted."""
    kept: int = 0
    """Rows that are trained or evaluated on: what is left of `rows` after `dropped`."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    tokens: int = 0
    supervised: int = 0
    """Tokens that are learned."""
    tail: int = 0
    """Tokens of a last block shorter than max_length, which is not trained on."""
    weighted: int = 0
    """Rows with a weight other than 1, of their own or of one of their turns."""
    weight_range: list[float] = field(default_factory=list)
    """Smallest and largest weight in those rows; empty without such rows."""
    fingerprint: str = ""
    """Of the tokens, labels and weights, in their order."""
    largest_id: int | None = None
    """The greatest token id; None where it is not known."""
    seen: ColumnUsage = field(default_factory=ColumnUsage)
    """Row formats and unused columns; of held-out rows among those of the split that they come from."""
    notes: dict[str, int] = field(default_factory=dict)
    """Line for the header -> rows that it holds for."""

    def __post_init__(self) -> None:
        """Rebuild `seen`, which stats.json holds as a plain object."""
        if isinstance(self.seen, dict):
            self.seen = ColumnUsage(**self.seen)

    def count(self, chunk: Chunk) -> None:
        """Add a chunk's rows and tokens."""
        self.rows += chunk.records
        self.seen.merge(chunk.seen)
        for reason, count in [("bad row", chunk.bad), *((reason, len(rows)) for reason, rows in chunk.dropped.items())]:
            if count:
                self.dropped[reason] = self.dropped.get(reason, 0) + count
        for note, rows in chunk.notes.items():
            if rows:
                self.notes[note] = self.notes.get(note, 0) + len(rows)
        # distinct records, because a record may have become several sequences
        if chunk.row_sources is not None:
            self.kept += len(np.unique(chunk.record))
            self.tokens += int(view(chunk.row_sources.column("tokens")).sum())
            self.supervised += int(chunk.supervised.sum())
        if chunk.sequences is not None and WEIGHTS in chunk.sequences.schema.names:
            self._count_weights(chunk.sequences.column(WEIGHTS), chunk.record)

    def _count_weights(self, column: pa.Array, record: np.ndarray) -> None:
        is_weighted, weights = other_weights(column)
        if is_weighted.any():
            self.weighted += len(np.unique(record[is_weighted]))
            numbers = [*self.weight_range, float(weights.min()), float(weights.max())]
            self.weight_range = [min(numbers), max(numbers)]


@dataclass
class Split:
    """A prepared split: an Arrow file with one row for each sequence, and columns input_ids, labels and others."""

    path: Path
    stats: SplitStats

    @cached_property
    def data(self) -> Dataset:
        """Its rows as a datasets.Dataset, for metrics; training reads the file without one."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path))


def read_splits(folder: Path) -> dict[str, Split]:
    """Read the splits of a cache entry that have rows."""
    all_stats = json.loads((folder / "stats.json").read_text())
    return {name: Split(folder / f"{name}.arrow", SplitStats(**stats)) for name, stats in all_stats.items() if stats["kept"]}


def refuse_empty(stats: dict[str, SplitStats], splits: Mapping[str, Iterable[Row]]) -> None:
    """Refuse splits without a row to train on.

    Raises:
        UserError: says how many rows were dropped, and why.
    """
    for name, split in stats.items():
        if split.kept:
            continue
        if not split.rows and not split.dropped:
            raise UserError("DSR103", f"{_only_file(splits.get(name))}the {name} data are empty: no rows were found")
        reasons = describe_dropped(split.dropped)
        raise UserError(
            "DSR102",
            f"no {name} row has a token to train on: {plural(split.rows or sum(split.dropped.values()), 'row')}"
            + (f" dropped ({reasons})" if reasons else "")
            + "; raise --max_length or fix the data",
        )


def _only_file(rows: object) -> str:
    """Return `FILE: ` where the rows are those of one file, else an empty text."""
    files: tuple[Path, ...] = getattr(getattr(rows, "rows", rows), "files", ())
    return f"{files[0]}: " if len(files) == 1 else ""


def describe_dropped(dropped: dict[str, int]) -> str:
    """Join reasons with counts: `2 bad rows, 1 longer than 512 tokens`."""
    # "bad row" takes a plural, "longer than 512 tokens" does not
    counts = (
        plural(count, reason) if reason.endswith("row") else f"{count:,} {reason}" for reason, count in dropped.items()
    )
    return ", ".join(counts)
