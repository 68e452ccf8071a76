"""A group of rows through format_row and encode, in a worker or here, as compact arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.columns import record_batch
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.files import LocatedRows, Row
from dsrecipes.data.origin import origins
from dsrecipes.data.records import Records, encode_group, record_hash
from dsrecipes.data.seen import Seen
from dsrecipes.data.weights import WEIGHTS, normalize_weights
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from dsrecipes.base import RecipeBase

Group = list[tuple[str, Row]]
"""Rows with their places."""
_ROWS, _CHARACTERS = 512, 4 << 20
"""A group ends at so many rows or characters: some groups for each worker are in memory at a time."""


@dataclass
class Chunk:
    """What became of a group's rows; tokens are in `sequences`, and the rest is one entry a sequence or a record."""

    bad: int = 0
    """Rows that format_row refused."""
    records: int = 0
    sequences: pa.RecordBatch | None = None
    """The columns that encode gave, of the sequences that are kept."""
    origins: pa.RecordBatch | None = None
    """Of each sequence: file, row number and tokens (data.origin)."""
    record: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Of each sequence: the index of its record."""
    supervised: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Of each sequence: tokens that are learned."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> indices of records."""
    notes: dict[str, list[int]] = field(default_factory=dict)
    """Line for the header -> indices of the records that it holds for."""
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """content_of of each record, where some are to be held out."""
    seen: Seen = field(default_factory=Seen)
    """Forms and columns of the rows; of a divided chunk the training rows have those of all."""

    def of(self, chosen: np.ndarray) -> Chunk:
        """The part that the chosen records have (a mask); bad rows are no records."""
        kept = chosen[self.record]
        part = Chunk(records=int(chosen.sum()), record=self.record[kept], supervised=self.supervised[kept])
        part.dropped = {why: [index for index in indices if chosen[index]] for why, indices in self.dropped.items()}
        part.notes = {note: [index for index in indices if chosen[index]] for note, indices in self.notes.items()}
        if self.sequences is not None and self.origins is not None and kept.any():
            part.sequences, part.origins = self.sequences.filter(pa.array(kept)), self.origins.filter(pa.array(kept))
        return part


def groups(rows: Iterable[tuple[str, Row]]) -> Iterator[Group]:
    """Rows in groups; an error while reading comes after the rows before it."""
    group: Group = []
    size = 0
    try:
        for where, row in rows:
            group.append((where, row))
            size += _characters(row)
            if len(group) == _ROWS or size > _CHARACTERS:
                yield group
                group, size = [], 0
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


def _characters(row: Row) -> int:
    """Of the texts of a row, those of its turns too."""
    values = list(row.values())
    turns = [turn for value in values if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    texts = chain(values, *(turn.values() for turn in turns))
    return sum(len(text) for text in texts if isinstance(text, str))


@dataclass(frozen=True)
class Encoding:
    """All that turns rows into a Chunk; a worker has it from its parent's memory."""

    recipe: type[RecipeBase]
    tokenizer: PreTrainedTokenizerBase
    options: EncodeOptions
    skip_bad_rows: bool
    keyed: bool = False
    """Whether records are to be held out, which takes their keys."""

    def __call__(self, group: Group) -> Chunk:
        """Format and encode.

        Raises:
            UserError: a row at fault, unless such rows are skipped.
        """
        records = Records(self.recipe.format_row, LocatedRows(group), self.skip_bad_rows)
        formatted = list(records)
        chunk = Chunk(records.dropped.get("bad row", 0), len(formatted), seen=records.seen)
        if self.keyed:
            chunk.keys = np.fromiter((record_hash(record) for _, record in formatted), np.uint64)
        if formatted:
            columns, good = encode_group(self.recipe, formatted, self.tokenizer, self.options, self.skip_bad_rows)
            self._fill(chunk, columns, good, [where for where, _ in formatted])
        return chunk

    def _fill(self, chunk: Chunk, columns: dict[str, list], good: list[int], places: list[str]) -> None:
        """Sequences that have a token to train on and are not too long; `good`: the records that could be encoded."""
        columns = dict(columns)
        normalize_weights(columns)
        weights = columns.get(WEIGHTS)
        if weights and self.recipe.cut_into_blocks:
            raise UserError(
                f"{self.recipe.__name__}: rows that are joined and cut into blocks cannot have weights; return none"
            )
        record = [good[index] for index in columns.pop("record", range(len(good)))]
        for index, notes in zip(good, columns.pop("notes", ()), strict=False):
            for note in notes:
                chunk.notes.setdefault(note, []).append(index)
        keep, tokens, supervised = [], [], []
        faults: dict[int, str] = dict.fromkeys(set(range(chunk.records)) - set(good), "unencodable row")
        for index, (ids, labels) in enumerate(zip(columns["input_ids"], columns["labels"], strict=True)):
            learned = _supervised(labels) if isinstance(labels, list) else 1
            if weights and weights[index] == 0:
                learned = 0
            if self.recipe.cut_into_blocks or (learned and _length(ids) <= self.options.max_length):
                keep.append(index)
                tokens.append(_total(ids))
                supervised.append(learned)
            else:
                faults.setdefault(record[index], self._fault(_length(ids)))
        chunk.record, chunk.supervised = np.array([record[i] for i in keep], np.int32), np.array(supervised, np.int32)
        faults |= dict.fromkeys(set(good) - set(record), "nothing to learn from")
        kept = set(chunk.record.tolist())
        for index, why in sorted(faults.items()):
            # a row of several sequences keeps the others
            chunk.dropped.setdefault(f"in part {why}" if index in kept else why, []).append(index)
        if keep:
            if len(keep) < len(record):
                columns = {name: [values[index] for index in keep] for name, values in columns.items()}
            chunk.sequences = record_batch(columns)
            chunk.origins = origins((places[index] for index in chunk.record), tokens)

    def _fault(self, length: int) -> str:
        longest = self.options.max_length
        return f"longer than {longest} tokens" if length > longest else "nothing to learn from"


def _supervised(labels: list[int]) -> int:
    """Labels that are learned; the first token is nobody's next one."""
    return len(labels) - 1 - labels.count(IGNORE) + (labels[0] == IGNORE) if labels else 0


def _length(ids: list[Any]) -> int:
    return max(map(len, ids), default=0) if ids and isinstance(ids[0], list) else len(ids)


def _total(ids: list[Any]) -> int:
    return sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
