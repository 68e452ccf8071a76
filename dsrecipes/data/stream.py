"""How is a run trained on rows that are tokenized while it trains? Serves windows by step, and resumes by position."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.encode import RowHooks
from dsrecipes.data.files import FileRows
from dsrecipes.data.provenance import describe_places
from dsrecipes.data.renamed import RenamedRows
from dsrecipes.data.sequences import Features, Sequences
from dsrecipes.data.split import describe_dropped
from dsrecipes.data.units import readable_place
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.data.window import StreamState, Window, WindowReader
from dsrecipes.errors import UserError, plural


class Stream(TorchDataset):
    """Training sequences by ordinal (step x sequences of a step + position in the step), which only grows.

    Every rank reads the same windows and takes its share of each step, so that ranks need not communicate about data. A thread
    reads the next window while the current one is trained on.
    """

    def __init__(
        self,
        rows: FileRows | RenamedRows,
        recipe: type[RowHooks],
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
        """Look at the sizes of the files; `begin` reads the first window.

        Args:
            rows: the files, perhaps with --columns.
            recipe: the hooks that format and encode rows.
            tokenizer: copied, because a thread uses it.
            options: passed to `encode`.
            per_step: sequences of a step, over all ranks.
            steps: of the run.
            seed: of the order of pieces and rows.
            shuffle: False keeps the order of the files.
            packing: put several rows into a sequence.
            skip_bad_rows: drop and count rows with a fault instead of raising.
            check_ids: raises ValueError for ids that the model does not know.
        """
        self.reader = WindowReader(
            rows,
            recipe,
            tokenizer,
            options,
            per_step=per_step,
            seed=seed,
            shuffle=shuffle,
            packing=packing,
            skip_bad_rows=skip_bad_rows,
            check_ids=check_ids,
        )
        self.per_step, self.steps = per_step, steps
        self.fingerprint = self.reader.fingerprint()
        self.window: Window
        self._thread = ThreadPoolExecutor(1, "stream")
        # a thread and not a process: tokenizers release the GIL, and a process would have to send the tokens back;
        # one window ahead: the thread reads while the model computes, and no more than two windows are in memory
        self._next: Future[Window] | None = None

    @property
    def capacity(self) -> int | None:
        """Tokens of a packed sequence; None where rows are not packed."""
        return self.reader.capacity

    def begin(self, state: dict[str, Any] | None) -> None:
        """Read the first window, or the window of a checkpoint (`state` is what Stream.state returned)."""
        self.window = self.reader.read(StreamState.from_json(state) if state else StreamState())
        self._read_ahead()

    def _read_ahead(self) -> None:
        if self.window.end.step < self.steps:
            self._next = self._thread.submit(self.reader.read, self.window.end)

    def close(self) -> None:
        """Stop the thread after the window that it is reading."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- for the trainer ----

    def __getitem__(self, ordinal: int) -> list[Features]:
        # ordinals grow without end, so an index names a sequence without knowing the windows before it
        step, position = divmod(ordinal, self.per_step)
        while step >= self.window.end.step:
            try:
                self.window = self._next.result() if self._next else self.reader.read(self.window.end)
            except UserError as error:
                raise UserError(
                    error.code,
                    f"{error.message}. The rows before it were trained on: the run stops after step {step}, and can be resumed "
                    "from its last checkpoint (--resume_from_checkpoint auto) as long as the file does not change",
                ) from error
            self._next = None
            self._read_ahead()
        return self.window.data[self._sequence(step, position)]

    def _sequence(self, step: int, position: int) -> int:
        return int(self.window.order[step - self.window.begin.step, position])

    def rows(self, ordinal: int) -> list[int]:
        """Numbers, in the current window, of the rows in a sequence."""
        return self.window.data.rows(self._sequence(*divmod(ordinal, self.per_step)))

    def places(self, rows: list[int]) -> str:
        """Name rows of the current window as places in the user's files."""
        places = [readable_place(self.window.places[row]).rpartition(" ") for row in rows[:24]]
        return describe_places([(source, int(number)) for source, _, number in places], len(rows))

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of a step stores: the beginning of the window that the next step is in.

        That window is read again on resuming: a position inside it would need its rows, shuffled and packed, in the checkpoint.
        """
        return asdict(self.window.end if step >= self.window.end.step else self.window.begin)

    def epoch(self, step: int) -> float:
        """Epochs that are used after a step, by bytes of the files."""
        # linear inside a window, whose steps have about equally many bytes
        begin, end = self.window.begin, self.window.end
        return begin.share + (end.share - begin.share) * min((step - begin.step) / len(self.window.order), 1.0)

    @property
    def weighted(self) -> bool:
        """Whether rows may have weights: a recipe that supports weights always returns the column."""
        table = self.window.data.table
        return table is not None and WEIGHTS in table.column_names

    @property
    def sample(self) -> Sequences:
        """Sequences that checks may look at: those of the current window."""
        return self.window.data

    # ---- for the header and the run folder ----

    def about(self) -> str:
        """Return the header's line: what is streamed, and what is not known in advance."""
        units, read = self.reader.units, self.window.end.read
        dropped = f", dropped {describe_dropped(read.dropped)}" if read.dropped else ""
        return (
            f"train: streamed from {plural(len(units.files), 'file')}, {sum(units.bytes) / 1e9:.3g} GB; rows, tokens and steps "
            f"of an epoch are not known in advance (read so far: {plural(read.kept, 'row')}{dropped})"
        )

    def notes(self) -> list[str]:
        """Return lines for the header: how a streamed run differs from one on prepared rows."""
        kinds, shuffle = set(self.reader.units.kinds), self.reader.shuffle
        ordered = "pieces of 128 kB in an order drawn for each epoch" if shuffle else "the order of the files"
        notes = [
            f"streaming: {ordered}, packed and shuffled inside windows of {self.reader.target:,} tokens, not over all rows; bad "
            "rows are found when they are reached; every rank reads and tokenizes all rows and trains on its share"
        ]
        if kinds - {"jsonl"} and shuffle:
            notes.append(
                "streaming: CSV, TSV, text and packed files are read from beginning to end and Parquet by row groups, so rows "
                "far apart are not mixed: shuffle the file first where its order matters, or convert it to .jsonl"
            )
        if "whole" in kinds:
            notes.append(
                "streaming: .gz, JSON arrays and UTF-16 have no positions: a resumed run reads such a file from its beginning, "
                "without tokenizing"
            )
        return notes

    def facts(self, step: int) -> dict[str, Any]:
        """Return what became of the rows up to a step, for data.json and the end of a run."""
        rows, tokens = self.window.used(step)
        read = asdict(self.window.end.read)
        return read | {"streamed": True, "used_rows": rows, "used_tokens": tokens, "epochs": self.epoch(step)}
