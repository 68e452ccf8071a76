"""Training rows that are read, tokenized and packed while the run trains, window by window, and resume by position."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.chunk import Chunk, Encoding, groups
from dsrecipes.data.collate import PADDING_ROW, Features, Sequences, StepSampler
from dsrecipes.data.columns import record_batch, view
from dsrecipes.data.files import FileRows
from dsrecipes.data.origin import place_words
from dsrecipes.data.pack import BlockCutter
from dsrecipes.data.prepare import SplitStats, _refuse_empty, describe_tokenizer, dropped_words
from dsrecipes.data.renamed import RenamedRows
from dsrecipes.data.units import UNIT, Position, Rows, Units, digest_bytes, readable_place
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import UserError, plural
from dsrecipes.io.paths import starter_path, user_path

if TYPE_CHECKING:
    from dsrecipes.base import RecipeBase
    from dsrecipes.config.schema import Config

_WINDOW_TOKENS = 1 << 19
"""Tokens that are shuffled and packed together, at least; large steps take twice a step's."""


def check_streaming(config: Config, auto_class: str) -> list[str]:
    """Refuse what the user asked for and a stream cannot do; turn off what a recipe asked for, and return notes on it.

    Raises:
        UserError: names the flag.
    """
    data, train, own = config.data, config.train, config.own
    if data.is_mixture:
        raise UserError(
            "--streaming true: --dataset and --eval_dataset take one data set each, without settings of its own: put the "
            "files into one folder, or give --streaming false"
        )
    if not auto_class.endswith("ForCausalLM"):
        raise UserError(
            "--streaming true: only recipes that train causal language models stream; the head of this one must know all "
            "labels beforehand. Give --streaming false"
        )
    if not user_path(starter_path(str(data.dataset))).exists():
        raise UserError(
            f"--streaming true reads files and folders, and --dataset {data.dataset} is neither: download first (hf download "
            f"{data.dataset} --repo-type dataset --local-dir DIR), then give --dataset DIR"
        )
    if train["max_steps"] <= 0:
        raise UserError(
            "--streaming true: the steps of an epoch are not known before the file is read, and the learning rate's schedule "
            "needs the number of steps: give --max_steps N instead of --num_train_epochs. Where the file ends before, it is "
            "read again in another order"
        )
    notes = []
    if data.validation_split:
        if "validation_split" in own:
            raise UserError(
                "--validation_split: rows that are streamed cannot be held out, for equal ones could be anywhere in the file: "
                "give --eval_dataset FILE, or --streaming false"
            )
        data.validation_split = 0.0
    for name in ("eval", "save", "logging"):
        if train[f"{name}_strategy"] == "epoch":
            raise UserError(
                f"--{name}_strategy epoch: with --streaming true the steps of an epoch are not known; give "
                f"--{name}_strategy steps --{name}_steps N"
            )
    if train["dataloader_num_workers"] and "dataloader_num_workers" in own:
        notes.append("dataloader_num_workers has no effect: with streaming, a thread of each rank reads ahead")
    return notes


@dataclass
class State:
    """Where a window begins: all that a resumed run needs to continue from there. Plain JSON."""

    step: int = 0
    """Optimizer steps before it."""
    epoch: int = 0
    unit: int = 0
    """Place of the next unit in the order of the epoch."""
    position: Position | None = None
    """Where in that unit."""
    rows: dict[str, list] = field(default_factory=dict)
    """Encoded rows of the windows before that fill no whole step."""
    places: list[str] = field(default_factory=list)
    """Where these rows came from."""
    rest: list[int] = field(default_factory=list)
    """Tokens that fill no whole block."""
    share: float = 0.0
    """Epochs before it, by bytes of the files."""
    used_rows: int = 0
    used_tokens: int = 0
    read: SplitStats = field(default_factory=SplitStats)
    """What became of the rows that were read before it."""

    @staticmethod
    def of(values: dict[str, Any]) -> State:
        """A state as a checkpoint holds it."""
        return State(**values | {"read": SplitStats(**values["read"])})


@dataclass
class Window:
    """Sequences of some pieces of the files, laid out in whole steps; the last window of an epoch fills its last step."""

    begin: State
    end: State
    data: Sequences
    order: np.ndarray
    """(steps, sequences of a step): numbers of sequences, or PADDING_ROW."""
    places: list[str]
    """Of the rows."""


class _Rows:
    """Encoded rows of a window while it grows; with `block`, blocks of so many tokens."""

    def __init__(self, begin: State, block: int | None) -> None:
        self.batches = [record_batch(begin.rows)] if begin.rows else []
        self.places = list(begin.places)
        self.stats = copy.deepcopy(begin.read)
        self.tokens = sum(map(len, begin.rows.get("input_ids", [])))
        self.cutter = BlockCutter(block) if block else None
        if self.cutter:
            self.cutter.rest = np.array(begin.rest, np.int32)

    def add(self, chunk: Chunk) -> None:
        """A chunk's rows, or the blocks that they complete."""
        self.stats.count(chunk)
        if chunk.sequences is None or chunk.origins is None:
            return
        places = [_place(row) for row in chunk.origins.to_pylist()]
        tokens = view(chunk.origins.column("tokens"))
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

    def end(self, alone: str | None) -> None:
        """Leave out the tokens at an epoch's end that fill no block, unless they are all: then `alone` is their place."""
        if self.cutter is None:
            return
        rest = self.cutter.rest
        if alone and not self.places and len(rest) > 1:
            self._add_blocks(rest[None])
            self.places.append(alone)
        else:
            self.stats.tail += len(rest)
        self.cutter.rest = rest[:0]

    def table(self) -> pa.Table:
        """All rows."""
        schema = self.batches[0].schema
        return pa.Table.from_batches([batch.cast(schema) for batch in self.batches]).combine_chunks()


class Stream(TorchDataset):
    """Training sequences by ordinal (step x sequences of a step + place in the step), which only grows.

    Windows follow from the files, the seed and the number of sequences in a step alone, so every rank makes the same ones
    and takes its share of each step. A thread makes the next window while this one is trained on.
    """

    def __init__(
        self,
        rows: FileRows | RenamedRows,
        recipe: type[RecipeBase],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        *,
        per_step: int,
        steps: int,
        seed: int,
        shuffle: bool,
        packing: bool,
        skip_bad_rows: bool,
        check_ids: Callable[[list[int]], None],
    ) -> None:
        """Look at the files' sizes; `begin` reads the first window.

        Args:
            per_step: sequences of a step, over all ranks.
            steps: of the run.
            check_ids: raises ValueError for ids that the model does not know.
        """
        self.names = rows if isinstance(rows, RenamedRows) else None
        files: Any = self.names.rows if self.names else rows
        self.units = Units(files.files, files.split)
        self.options, self.check_ids = options, check_ids
        # a fast tokenizer must not be used by two threads at a time
        self.encoding = Encoding(recipe, copy.deepcopy(tokenizer), options, skip_bad_rows)
        self.block = options.max_length if recipe.cut_into_blocks else None
        self.per_step, self.steps, self.seed, self.shuffle = per_step, steps, seed, shuffle
        self.capacity = options.max_length if packing and not recipe.cut_into_blocks else None
        self.target = max(_WINDOW_TOKENS, 2 * per_step * options.max_length)
        self.fingerprint = self._fingerprint()
        self.window: Window
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        self._pieces: Iterator[tuple[Rows, int, Position | None]] | None = None
        self._thread = ThreadPoolExecutor(1, "stream")
        self._next: Future[Window] | None = None

    def _fingerprint(self) -> str:
        """A hash of the files' names, sizes and samples of their bytes, and of what makes tokens of them."""
        columns = self.names.columns if self.names else ()
        tokenizer = describe_tokenizer(self.encoding.tokenizer)
        settings = (self.options, UNIT, self.target, self.units.split, columns, tokenizer)
        hashed = hashlib.sha256(repr(settings).encode())
        for path in self.units.files:
            hashed.update(digest_bytes(path))
        return f"streamed {hashed.hexdigest()[:16]}"

    # ---- windows ----

    def begin(self, state: dict[str, Any] | None) -> None:
        """Make the first window, or the one that a checkpoint lies in."""
        self.window = self._make(State.of(state) if state else State())
        self._read_ahead()

    def _read_ahead(self) -> None:
        if self.window.end.step < self.steps:
            self._next = self._thread.submit(self._make, self.window.end)

    def close(self) -> None:
        """End the thread once its window is made."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _units(self, epoch: int) -> np.ndarray:
        """The order of an epoch's units."""
        if self._order[0] != epoch:
            count = len(self.units)
            order = np.random.default_rng((self.seed, epoch)).permutation(count) if self.shuffle else np.arange(count)
            self._order = (epoch, order)
        return self._order[1]

    def _read(self, state: State) -> Iterator[tuple[Rows, int, Position | None]]:
        """Pieces of an epoch from a state on, with where the next one begins."""
        order, position = self._units(state.epoch), state.position
        for place in range(state.unit, len(order)):
            for rows, after in self.units.pieces(int(order[place]), position):
                yield rows, place + (after is None), after
            position = None

    def _make(self, begin: State) -> Window:
        """The window that begins at a state.

        Raises:
            UserError: a row at fault, with its place, or no row of an epoch has a token to train on.
        """
        rows = _Rows(begin, self.block)
        self._pieces = self._pieces or self._read(begin)
        unit, position, ended = begin.unit, begin.position, False
        at_start = begin.unit == 0 and begin.position is None
        while rows.tokens < self.target and not ended:
            piece = next(self._pieces, None)
            if piece is None:
                ended, self._pieces = True, None
                rows.end(alone=f"{self.units.files[0]}, line 1" if at_start else None)
            else:
                found, unit, position = piece
                if self.names and at_start and not rows.places:
                    self.names.check(found)
                for group in groups(self.names.apply(found) if self.names else found):
                    rows.add(self._checked(self.encoding(group)))
        if not rows.places:
            if at_start:
                rows.stats.kept = 0
                _refuse_empty({"train": rows.stats}, {"train": FileRows(tuple(self.units.files))})
            following = State(begin.step, begin.epoch + 1, read=rows.stats, share=begin.epoch + 1.0)
            following.used_rows, following.used_tokens = begin.used_rows, begin.used_tokens
            return self._make(following)
        table = rows.table()
        data = Sequences(table, self.capacity)
        order, left = self._lay_out(data, begin.step, ended)
        end = State(begin.step + len(order), begin.epoch + ended, read=rows.stats)
        end.share = self._share(begin.epoch, unit, position, ended)
        if not ended:
            end.unit, end.position = unit, position
            end.rows = table.take(pa.array(left, pa.int64())).to_pydict() if left else {}
            end.places = [rows.places[row] for row in left]
            end.rest = rows.cutter.rest.tolist() if rows.cutter else []
        window = Window(begin, end, data, order, rows.places)
        end.used_rows, end.used_tokens = _used(window, end.step)
        return window

    def _checked(self, chunk: Chunk) -> Chunk:
        """Refuse tokens that the model does not know (UserError, with the row's place)."""
        if chunk.sequences is not None and chunk.origins is not None:
            for row, ids in enumerate(chunk.sequences.column("input_ids")):
                numbers = view(ids.values)
                try:
                    self.check_ids([int(numbers.max(initial=0))])
                except ValueError as error:
                    where = chunk.origins.slice(row, 1).to_pylist()[0]
                    raise UserError(f"{readable_place(_place(where))}: {error}") from None
        return chunk

    def _share(self, epoch: int, unit: int, position: Position | None, ended: bool) -> float:
        order, weights = self._units(epoch), self.units.weights
        read = weights[order[:unit]].sum()
        if position is not None:
            read += self.units.progress(int(order[unit]), position)
        return epoch + (1.0 if ended else float(read / max(weights.sum(), 1)))

    def _lay_out(self, data: Sequences, step: int, ended: bool) -> tuple[np.ndarray, list[int]]:
        """Sequences by step as StepSampler deals them, and the rows of those that fill no step."""
        sampler = StepSampler(data.lengths, self.per_step, seed=self.seed, shuffle=self.shuffle)
        sampler.set_epoch(step)  # another draw for each window
        order = sampler.order()
        if ended or PADDING_ROW not in order[-1]:
            return order, []
        left = [row for sequence in order[-1] if sequence != PADDING_ROW for row in data.rows(int(sequence))]
        return order[:-1], sorted(left)

    # ---- what the trainer asks for ----

    def __getitem__(self, ordinal: int) -> list[Features]:
        step, place = divmod(ordinal, self.per_step)
        while step >= self.window.end.step:
            try:
                self.window = self._next.result() if self._next else self._make(self.window.end)
            except UserError as error:
                raise UserError(
                    f"{error}. The rows before it were trained on: the run stops after step {step}, and can be resumed from "
                    "its last checkpoint (--resume_from_checkpoint auto) where the file stays as it is"
                ) from error
            self._next = None
            self._read_ahead()
        return self.window.data[self._sequence(step, place)]

    def _sequence(self, step: int, place: int) -> int:
        return int(self.window.order[step - self.window.begin.step, place])

    def rows(self, ordinal: int) -> list[int]:
        """Numbers in this window of the rows in a sequence."""
        return self.window.data.rows(self._sequence(*divmod(ordinal, self.per_step)))

    def places(self, rows: list[int]) -> str:
        """Rows of this window as places of the user's files."""
        split = [readable_place(self.window.places[row]).rpartition(" ") for row in rows[:24]]
        return place_words([(source, int(number)) for source, _, number in split], len(rows))

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of a step holds: where the window begins that the next step is in."""
        return asdict(self.window.end if step >= self.window.end.step else self.window.begin)

    def epoch(self, step: int) -> float:
        """Epochs that are used after a step, by bytes of the files."""
        begin, end = self.window.begin, self.window.end
        return begin.share + (end.share - begin.share) * min((step - begin.step) / len(self.window.order), 1.0)

    @property
    def weighted(self) -> bool:
        """Whether rows may have weights: a recipe that knows weights always gives the column."""
        return WEIGHTS in self.window.data.path.column_names

    # ---- what is reported ----

    @property
    def sample(self) -> Sequences:
        """Sequences that can be looked at: the current window's."""
        return self.window.data

    def about(self) -> str:
        """The header's line: what is streamed, and what is not known."""
        files, size, read = self.units.files, sum(self.units.bytes), self.window.end.read
        dropped = f", dropped {dropped_words(read.dropped)}" if read.dropped else ""
        return (
            f"train: streamed from {plural(len(files), 'file')}, {size / 1e9:.3g} GB; rows, tokens and steps of an epoch are "
            f"not known beforehand (read so far: {plural(read.kept, 'row')}{dropped})"
        )

    def notes(self) -> list[str]:
        """What a stream does in another way, for the header."""
        kinds = set(self.units.kinds)
        ordered = "pieces of 128 kB in an order drawn for each epoch" if self.shuffle else "the order of the files"
        notes = [
            f"streaming: {ordered}, packed and shuffled inside windows of {self.target:,} tokens, not over the whole; bad rows "
            "are found when they are reached; every rank reads and tokenizes all rows and trains on its share"
        ]
        if kinds - {"jsonl"} and self.shuffle:
            notes.append(
                "streaming: CSV, TSV, text and packed files are read from beginning to end and Parquet by row groups, so rows "
                "far apart are not mixed: shuffle the file beforehand where its order matters, or convert it to .jsonl"
            )
        if "whole" in kinds:
            notes.append(
                "streaming: .gz, JSON arrays and UTF-16 have no positions: a resumed run reads such a file from its beginning, "
                "without tokenizing"
            )
        return notes

    def facts(self, step: int) -> dict[str, Any]:
        """What became of the rows up to a step, for data.json and the end of a run."""
        rows, tokens = _used(self.window, step)
        read = asdict(self.window.end.read)
        return read | {"streamed": True, "used_rows": rows, "used_tokens": tokens, "epochs": self.epoch(step)}


def _place(origin: dict[str, Any]) -> str:
    """A row of data.origin.origins as it was given."""
    return f"{origin['source']} {origin['number']}"


def _used(window: Window, step: int) -> tuple[int, int]:
    """Rows and tokens of the steps before `step`, which lies in the window or at its end."""
    order = window.order[: step - window.begin.step]
    sequences = order[order != PADDING_ROW]
    rows = sum(len(window.data.rows(int(sequence))) for sequence in sequences)
    return window.begin.used_rows + rows, window.begin.used_tokens + int(window.data.lengths[sequences].sum())


class StreamSampler:
    """Ordinals of one rank by micro batch, laid out as StepSampler does: (accumulation, rank, micro) in each step."""

    def __init__(self, steps: int, shape: tuple[int, int, int], rank: int) -> None:
        """`shape`: accumulation, ranks and micro batch."""
        self.steps, self.shape, self.rank = steps, shape, rank

    def set_epoch(self, epoch: int) -> None:
        """For Trainer a whole run is one epoch."""

    def __len__(self) -> int:
        return self.steps * self.shape[0]

    def __iter__(self) -> Iterator[list[int]]:
        places = np.arange(int(np.prod(self.shape))).reshape(self.shape)
        for step in range(self.steps):
            yield from (step * places.size + places[:, self.rank]).tolist()


def stream_files(rows: Any, dataset: str | None) -> FileRows | RenamedRows:
    """The files to be streamed, perhaps with --columns.

    Raises:
        UserError: the recipe reads the data in another way.
    """
    if not isinstance(rows.rows if isinstance(rows, RenamedRows) else rows, FileRows):
        raise UserError(
            f"--streaming true: this recipe does not read --dataset {dataset} file by file; give --streaming false"
        )
    return rows
