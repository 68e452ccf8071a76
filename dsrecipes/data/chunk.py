"""What does a group of rows become? format_row and encode for some hundred rows, as compact arrays.

A group is the unit of work of the worker processes: large enough that passing it between processes costs little, small enough
that several fit into memory for each worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.columns import record_batch
from dsrecipes.data.encode import IGNORE, RowHooks
from dsrecipes.data.provenance import RowSources
from dsrecipes.data.records import Records, encode_group, record_hash
from dsrecipes.data.row import LocatedRows, Row
from dsrecipes.data.usage import ColumnUsage
from dsrecipes.data.weights import WEIGHTS, normalize_weights
from dsrecipes.errors import UserError

Group = list[tuple[str, Row]]
"""Rows with their places."""
_ROWS, _CHARACTERS = 512, 4 << 20
"""A group ends at this many rows or characters."""


def _no_indices() -> np.ndarray:
    return np.empty(0, np.int32)


@dataclass
class Chunk:
    """The result of a group of rows: their tokens as `sequences`, and one entry for each sequence or record.

    Arrow and numpy arrays instead of lists of ints, because a chunk is pickled from a worker to the main process.
    """

    bad: int = 0
    """Rows that format_row refused."""
    records: int = 0
    """Rows that format_row accepted."""
    sequences: pa.RecordBatch | None = None
    """The columns that encode returned, of the sequences that are kept."""
    row_sources: pa.RecordBatch | None = None
    """For each sequence: file, row number and tokens (RowSources.batch)."""
    record: np.ndarray = field(default_factory=_no_indices)
    """For each sequence: the index of its record."""
    supervised: np.ndarray = field(default_factory=_no_indices)
    """For each sequence: the number of tokens that are learned."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> indices of records."""
    notes: dict[str, list[int]] = field(default_factory=dict)
    """Line for the header -> indices of the records that it holds for."""
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """record_hash of each record, where some are to be held out."""
    seen: ColumnUsage = field(default_factory=ColumnUsage)
    """Formats and columns of the rows; after a division the training part has those of all rows."""

    def subset(self, chosen: np.ndarray) -> Chunk:
        """Return the part of the chosen records (a mask); bad rows are no records and are not in it."""
        mask = chosen[self.record]
        # indices of records stay those of the group, so `record` and `dropped` need not be renumbered
        part = Chunk(records=int(chosen.sum()), record=self.record[mask], supervised=self.supervised[mask])
        part.dropped = {reason: [index for index in indices if chosen[index]] for reason, indices in self.dropped.items()}
        part.notes = {note: [index for index in indices if chosen[index]] for note, indices in self.notes.items()}
        if self.sequences is not None and self.row_sources is not None and mask.any():
            arrow_mask = pa.array(mask)
            part.sequences, part.row_sources = self.sequences.filter(arrow_mask), self.row_sources.filter(arrow_mask)
        return part


def groups(rows: Iterable[tuple[str, Row]]) -> Iterator[Group]:
    """Divide rows into groups; an error while reading is raised after the rows before it."""
    # characters bound a group too: 512 rows can be a kilobyte or a gigabyte
    group: Group = []
    size = 0
    try:
        for place, row in rows:
            group.append((place, row))
            size += _characters(row)
            if len(group) == _ROWS or size > _CHARACTERS:
                yield group
                group, size = [], 0
    except Exception:
        # a faulty row in this group comes before the error in the file, so its message must come first
        if group:
            yield group
        raise
    if group:
        yield group


def _characters(row: Row) -> int:
    """Count the characters in the texts of a row, including the texts of its turns."""
    values = list(row.values())
    turns = [turn for value in values if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    texts = chain(values, *(turn.values() for turn in turns))
    return sum(len(text) for text in texts if isinstance(text, str))


@dataclass(frozen=True)
class Encoding:
    """Everything that turns a group of rows into a Chunk; a worker process inherits it through fork."""

    recipe: type[RowHooks]
    tokenizer: PreTrainedTokenizerBase
    options: EncodeOptions
    skip_bad_rows: bool
    keyed: bool = False
    """Compute the keys of the records, because some are to be held out."""

    def __call__(self, group: Group) -> Chunk:
        """Format and encode a group.

        Raises:
            UserError: a row has a fault, unless such rows are skipped.
        """
        records = Records(self.recipe.format_row, LocatedRows(group), self.skip_bad_rows)
        formatted = list(records)
        chunk = Chunk(records.dropped.get("bad row", 0), len(formatted), seen=records.seen)
        if self.keyed:
            # computed here, in the worker, because hashing takes as long as encoding short rows
            chunk.keys = np.fromiter((record_hash(record) for _, record in formatted), np.uint64)
        if formatted:
            columns, good = encode_group(self.recipe, formatted, self.tokenizer, self.options, self.skip_bad_rows)
            self._fill(chunk, dict(columns), good, [place for place, _ in formatted])
        return chunk

    def _fill(self, chunk: Chunk, columns: dict[str, list], good: list[int], places: list[str]) -> None:
        """Keep the sequences that have a token to train on and are not too long.

        Args:
            chunk: gets the sequences and what became of the records.
            columns: what encode returned; sequences may share a record.
            good: indices of the records that could be encoded.
            places: of all records.
        """
        normalize_weights(columns)
        self._refuse_weighted_blocks(columns)
        # from here on an index is that of a record of the group, also where encode saw only the good ones
        record = [good[index] for index in columns.pop("record", range(len(good)))]
        for index, notes in zip(good, columns.pop("notes", ()), strict=False):
            for note in notes:
                chunk.notes.setdefault(note, []).append(index)
        faults: dict[int, str] = dict.fromkeys(set(range(chunk.records)) - set(good), "unencodable row")
        keep, supervised = self._usable(columns, record, faults)
        chunk.record = np.array([record[index] for index in keep], np.int32)
        chunk.supervised = np.array(supervised, np.int32)
        _count_faults(chunk, faults | dict.fromkeys(set(good) - set(record), "nothing to learn from"))
        if keep:
            if len(keep) < len(record):
                columns = {name: [values[index] for index in keep] for name, values in columns.items()}
            chunk.sequences = record_batch(columns)
            tokens = [_total(ids) for ids in columns["input_ids"]]
            chunk.row_sources = RowSources.batch((places[index] for index in chunk.record), tokens)

    def _usable(self, columns: dict[str, list], record: list[int], faults: dict[int, str]) -> tuple[list[int], list[int]]:
        """Choose the sequences to keep; adds the reason of each other one to `faults`, by record.

        Returns:
            The indices of the sequences, and the tokens that are learned in each.
        """
        weights = columns.get(WEIGHTS)
        keep, supervised = [], []
        for index, (ids, labels) in enumerate(zip(columns["input_ids"], columns["labels"], strict=True)):
            learned = _supervised(labels) if isinstance(labels, list) else 1
            if weights and weights[index] == 0:
                learned = 0
            length = _length(ids)
            # dropped and not cut: a cut answer would teach the model to stop in the middle of a sentence
            if self.recipe.cut_into_blocks or (learned and length <= self.options.max_length):
                keep.append(index)
                supervised.append(learned)
            else:
                faults.setdefault(record[index], self._fault(length))
        return keep, supervised

    def _refuse_weighted_blocks(self, columns: dict[str, list]) -> None:
        if columns.get(WEIGHTS) and self.recipe.cut_into_blocks:
            raise UserError(
                "DSR104",
                f"{self.recipe.__name__}: rows that are joined and cut into blocks cannot have weights; let encode return none",
            )

    def _fault(self, length: int) -> str:
        longest = self.options.max_length
        return f"longer than {longest} tokens" if length > longest else "nothing to learn from"


def _count_faults(chunk: Chunk, faults: dict[int, str]) -> None:
    """Add the reasons why records were dropped; a record of several sequences may have lost only a part."""
    remaining = set(chunk.record.tolist())
    for index, reason in sorted(faults.items()):
        chunk.dropped.setdefault(f"in part {reason}" if index in remaining else reason, []).append(index)


def _supervised(labels: list[int]) -> int:
    """Count the labels that are learned: the first token is predicted from nothing, so its label does not count."""
    if not labels:
        return 0
    ignored = labels.count(IGNORE) - (labels[0] == IGNORE)
    return len(labels) - 1 - ignored


def _length(ids: list[Any]) -> int:
    """Count the tokens of a sequence; of several texts those of the longest."""
    return max(map(len, ids), default=0) if ids and isinstance(ids[0], list) else len(ids)


def _total(ids: list[Any]) -> int:
    """Count the tokens of a sequence; of several texts those of all."""
    return sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
