"""Which rows of a stream are trained on together? Reads files piece by piece into windows that are shuffled and packed.

A window depends on the files, the settings and the state that it begins in, and on nothing else. So every rank makes the same
windows, and a resumed run continues from a state that is small enough for a checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.cache import describe_tokenizer
from dsrecipes.data.chunk import Chunk, Encoding, groups
from dsrecipes.data.columns import record_batch, view
from dsrecipes.data.encode import RowHooks
from dsrecipes.data.files import FileRows
from dsrecipes.data.pack import BlockCutter
from dsrecipes.data.renamed import RenamedRows
from dsrecipes.data.sampler import StepSampler
from dsrecipes.data.sequences import PADDING_ROW, Sequences
from dsrecipes.data.split import SplitStats, refuse_empty
from dsrecipes.data.units import UNIT, Position, Rows, Units, digest_bytes, readable_place
from dsrecipes.errors import UserError

WINDOW_TOKENS = 1 << 19
"""Least number of tokens that are shuffled and packed together; where steps are large, twice the tokens of a step."""


@dataclass
class StreamState:
    """Where a window begins: all that a resumed run needs to continue from there. Plain JSON."""

    step: int = 0
    """Optimizer steps before it."""
    epoch: int = 0
    unit: int = 0
    """Index of the next unit in the order of the epoch."""
    position: Position | None = None
    """Where in that unit."""
    rows: dict[str, list] = field(default_factory=dict)
    """Encoded rows of earlier windows that do not fill a step."""
    places: list[str] = field(default_factory=list)
    """Where these rows came from."""
    rest: list[int] = field(default_factory=list)
    """Tokens that do not fill a block."""
    share: float = 0.0
    """Epochs before it, by bytes of the files."""
    used_rows: int = 0
    used_tokens: int = 0
    read: SplitStats = field(default_factory=SplitStats)
    """What became of the rows that were read before it."""

    @staticmethod
    def from_json(values: dict[str, Any]) -> StreamState:
        """Rebuild the state that a checkpoint holds."""
        return StreamState(**values | {"read": SplitStats(**values["read"])})


@dataclass
class Window:
    """Sequences of some pieces of the files, laid out in full steps; the last window of an epoch pads its last step."""

    begin: StreamState
    end: StreamState
    data: Sequences
    order: np.ndarray
    """Numbers of sequences, or PADDING_ROW: (steps, sequences of a step)."""
    places: list[str]
    """Of the rows."""

    def used(self, step: int) -> tuple[int, int]:
        """Count the rows and tokens of the run before `step`, which is in the window or at its end."""
        order = self.order[: step - self.begin.step]
        sequences = order[order != PADDING_ROW]
        rows = sum(len(self.data.rows(int(sequence))) for sequence in sequences)
        return self.begin.used_rows + rows, self.begin.used_tokens + int(self.data.lengths[sequences].sum())


class _GrowingWindow:
    """Encoded rows of a window while it is read; where texts are cut, blocks instead of rows."""

    def __init__(self, begin: StreamState, block: int | None) -> None:
        """Start with the rows that earlier windows left over; `block` is the number of tokens of a block."""
        self.batches = [record_batch(begin.rows)] if begin.rows else []
        self.places = list(begin.places)
        # a copy, because the state may be in a checkpoint or be read from again
        self.stats = copy.deepcopy(begin.read)
        self.tokens = sum(map(len, begin.rows.get("input_ids", [])))
        self.cutter = BlockCutter(block) if block else None
        if self.cutter:
            self.cutter.rest = np.array(begin.rest, np.int32)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk's rows, or the blocks that they complete."""
        self.stats.count(chunk)
        if chunk.sequences is None or chunk.row_sources is None:
            return
        places = [_place(row) for row in chunk.row_sources.to_pylist()]
        tokens = view(chunk.row_sources.column("tokens"))
        self.tokens += int(tokens.sum())
        if self.cutter is None:
            self.batches.append(chunk.sequences)
            self.places += places
            return
        ends = len(self.cutter.rest) + np.cumsum(tokens)
        blocks = self.cutter.cut(view(chunk.sequences.column("input_ids").flatten()))
        self._add_blocks(blocks)
        # a block has the place of the row that it ends in
        rows = np.searchsorted(ends, self.cutter.size * np.arange(1, len(blocks) + 1))
        self.places += [places[row] for row in rows]

    def _add_blocks(self, blocks: np.ndarray) -> None:
        if blocks.size:
            self.batches.append(record_batch({"input_ids": blocks.tolist(), "labels": blocks.tolist()}))

    def finish_epoch(self, only_place: str | None) -> None:
        """Drop the tokens that fill no block, unless they are all tokens of the epoch: then `only_place` is their place."""
        if self.cutter is None:
            return
        rest = self.cutter.rest
        if only_place and not self.places and len(rest) > 1:
            self._add_blocks(rest[None])
            self.places.append(only_place)
        else:
            self.stats.tail += len(rest)
        self.cutter.rest = rest[:0]

    def table(self) -> pa.Table:
        """Return all rows."""
        schema = self.batches[0].schema
        return pa.Table.from_batches([batch.cast(schema) for batch in self.batches]).combine_chunks()


class WindowReader:
    """Reads the training files of a stream into windows."""

    def __init__(
        self,
        rows: FileRows | RenamedRows,
        recipe: type[RowHooks],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        *,
        per_step: int,
        seed: int,
        shuffle: bool,
        packing: bool,
        skip_bad_rows: bool,
        check_ids: Callable[[list[int]], None],
    ) -> None:
        """Look at the sizes of the files; no row is read yet. The arguments are those of Stream."""
        self.names = rows if isinstance(rows, RenamedRows) else None
        files: Any = self.names.rows if self.names else rows
        self.units = Units(files.files, files.split)
        self.options, self.check_ids = options, check_ids
        # a fast tokenizer must not be used by two threads at the same time
        self.encoding = Encoding(recipe, copy.deepcopy(tokenizer), options, skip_bad_rows)
        self.block = options.max_length if recipe.cut_into_blocks else None
        self.capacity = options.max_length if packing and not recipe.cut_into_blocks else None
        self.per_step, self.seed, self.shuffle = per_step, seed, shuffle
        self.target = max(WINDOW_TOKENS, 2 * per_step * options.max_length)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        self._pieces: Iterator[tuple[Rows, int, Position | None]] | None = None

    def fingerprint(self) -> str:
        """Hash the names, sizes and samples of the files' bytes, and everything that makes tokens of them."""
        columns = self.names.columns if self.names else ()
        tokenizer = describe_tokenizer(self.encoding.tokenizer)
        settings = (self.options, UNIT, self.target, self.units.split, columns, tokenizer)
        digest = hashlib.sha256(repr(settings).encode())
        for path in self.units.files:
            digest.update(digest_bytes(path))
        return f"streamed {digest.hexdigest()[:16]}"

    def read(self, begin: StreamState) -> Window:
        """Read the window that begins in a state. Windows must be read in order, or from a checkpoint's state.

        Raises:
            UserError: a row has a fault (with its place), or no row of an epoch has a token to train on.
        """
        # rows left over from the window before come first, so that no row is skipped or used twice
        growing = _GrowingWindow(begin, self.block)
        unit, position, ended = self._fill(growing, begin)
        # the rest of an epoch may have no usable row; its counts are carried over
        if not growing.places:
            return self._read_next_epoch(begin, growing)
        table = growing.table()
        data = Sequences(table, self.capacity)
        order, left = self._lay_out(data, begin.step, ended)
        end = StreamState(begin.step + len(order), begin.epoch + ended, read=growing.stats)
        end.share = self._share(begin.epoch, unit, position, ended)
        if not ended:
            end.unit, end.position = unit, position
            end.rows = table.take(pa.array(left, pa.int64())).to_pydict() if left else {}
            end.places = [growing.places[row] for row in left]
            end.rest = growing.cutter.rest.tolist() if growing.cutter else []
        window = Window(begin, end, data, order, growing.places)
        end.used_rows, end.used_tokens = window.used(end.step)
        return window

    def _fill(self, growing: _GrowingWindow, begin: StreamState) -> tuple[int, Position | None, bool]:
        """Read pieces until the window has its tokens; returns where the next piece begins, and whether the epoch ended."""
        pieces = self._pieces or self._read_pieces(begin)
        self._pieces = pieces
        unit, position = begin.unit, begin.position
        while growing.tokens < self.target:
            piece = next(pieces, None)
            if piece is None:
                self._pieces = None
                growing.finish_epoch(f"{self.units.files[0]}, line 1" if _begins_epoch(begin) else None)
                return unit, position, True
            rows, unit, position = piece
            if self.names and _begins_epoch(begin) and not growing.places:
                self.names.check(rows)
            for group in groups(self.names.apply(rows) if self.names else rows):
                growing.add(self._checked(self.encoding(group)))
        return unit, position, False

    def _read_next_epoch(self, begin: StreamState, growing: _GrowingWindow) -> Window:
        """Skip the end of an epoch that has no more rows (UserError: the epoch has none at all)."""
        if _begins_epoch(begin):
            growing.stats.kept = 0
            refuse_empty({"train": growing.stats}, {"train": FileRows(tuple(self.units.files))})
        following = StreamState(begin.step, begin.epoch + 1, read=growing.stats, share=begin.epoch + 1.0)
        following.used_rows, following.used_tokens = begin.used_rows, begin.used_tokens
        return self.read(following)

    def _unit_order(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch's units."""
        if self._order[0] != epoch:
            count = len(self.units)
            order = np.random.default_rng((self.seed, epoch)).permutation(count) if self.shuffle else np.arange(count)
            self._order = (epoch, order)
        return self._order[1]

    def _read_pieces(self, state: StreamState) -> Iterator[tuple[Rows, int, Position | None]]:
        """Yield the pieces of an epoch from a state on, with where the next piece begins."""
        order, position = self._unit_order(state.epoch), state.position
        for index in range(state.unit, len(order)):
            for rows, following in self.units.pieces(int(order[index]), position):
                yield rows, index + (following is None), following
            position = None

    def _checked(self, chunk: Chunk) -> Chunk:
        """Refuse token ids that the model does not know (UserError, with the row's place)."""
        if chunk.sequences is not None and chunk.row_sources is not None:
            for row, ids in enumerate(chunk.sequences.column("input_ids")):
                # only the largest id of a row is checked, which is enough and costs one pass
                largest = int(view(ids.values).max(initial=0))
                try:
                    self.check_ids([largest])
                except ValueError as error:
                    place = _place(chunk.row_sources.slice(row, 1).to_pylist()[0])
                    raise UserError("DSR158", f"{readable_place(place)}: {error}") from None
        return chunk

    def _share(self, epoch: int, unit: int, position: Position | None, ended: bool) -> float:
        """Return the number of epochs that are read, by bytes."""
        order, weights = self._unit_order(epoch), self.units.weights
        read = weights[order[:unit]].sum()
        if position is not None:
            read += self.units.progress(int(order[unit]), position)
        return epoch + (1.0 if ended else float(read / max(weights.sum(), 1)))

    def _lay_out(self, data: Sequences, step: int, ended: bool) -> tuple[np.ndarray, list[int]]:
        """Divide sequences into steps as StepSampler does; returns the steps, and the rows that do not fill a step."""
        sampler = StepSampler(data.lengths, self.per_step, seed=self.seed, shuffle=self.shuffle)
        sampler.set_epoch(step)  # so that each window is shuffled differently
        order = sampler.order()
        # rows of an unfinished step join the next window; only at the end of an epoch are they trained on with padding rows
        if ended or PADDING_ROW not in order[-1]:
            return order, []
        left = [row for sequence in order[-1] if sequence != PADDING_ROW for row in data.rows(int(sequence))]
        return order[:-1], sorted(left)


def _begins_epoch(state: StreamState) -> bool:
    return state.unit == 0 and state.position is None


def _place(row_source: dict[str, Any]) -> str:
    """Return the place of a row as it was passed to RowSources.batch."""
    return f"{row_source['source']} {row_source['number']}"
