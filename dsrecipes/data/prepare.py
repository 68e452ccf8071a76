"""How are rows prepared? Format, encode, hold out and write each split, once for each content.

The result is cached (see cache.py for the key): one rank writes, and the others wait for its lock. Rows pass through as a
stream of chunks, so that memory does not grow with the data.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.cache import cache_key, is_written, writing
from dsrecipes.data.chunk import Chunk, Encoding, groups
from dsrecipes.data.columns import ColumnWriter, read_batches, view
from dsrecipes.data.encode import RowHooks
from dsrecipes.data.holdout import HoldOut, hold_out
from dsrecipes.data.pack import BlockCutter
from dsrecipes.data.provenance import RowSources
from dsrecipes.data.row import Row, located
from dsrecipes.data.split import Split, SplitStats, read_splits, refuse_empty
from dsrecipes.data.workers import cores, in_order
from dsrecipes.io.console import Console
from dsrecipes.io.paths import cache_root

_Choose = Callable[[np.ndarray], np.ndarray]
"""Keys of records -> which of them are held out."""


def prepare(
    recipe: type[RowHooks],
    splits: dict[str, Iterable[Row]],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    *,
    validation_split: float,
    seed: int,
    skip_bad_rows: bool,
    console: Console,
    workers: int | None = None,
    hold_out: HoldOut = hold_out,
) -> dict[str, Split]:
    """Format, encode and write each split, or take it from the cache.

    Args:
        recipe: the hooks.
        splits: rows by split; other names than train, validation and test are ignored.
        tokenizer: passed to `encode`.
        options: passed to `encode`.
        validation_split: share of the training rows to hold out where there is no validation split.
        seed: of that choice.
        skip_bad_rows: drop and count rows with a fault instead of raising.
        console: shows the progress.
        workers: processes that format and encode; None: one for each core, and none for few rows. The result is the same.
        hold_out: chooses the held-out records.

    Raises:
        UserError: a row has a fault (with its place), or a split has no rows, or none with a token to train on.
    """
    names = [name for name in ("train", "validation", "test") if name in splits]
    # an iterator can be read once, but rows are read for the cache key and again to be encoded
    splits = {name: list(splits[name]) if isinstance(splits[name], Iterator) else splits[name] for name in names}
    share = validation_split if "validation" not in splits else 0.0
    # without a choice the seed is left out, so that another seed finds the same entry
    key = cache_key(recipe, splits, tokenizer, options, share, seed if share else 0, skip_bad_rows, hold_out.__name__)
    folder = cache_root() / "data" / key
    if not is_written(folder):
        with writing(folder) as missing:
            if missing:
                encoding = Encoding(recipe, tokenizer, options, skip_bad_rows)
                choose = partial(hold_out, share=share, seed=seed) if share else None
                _write_splits(folder, splits, encoding, choose, workers or cores(), console)
    return read_splits(folder)


def _write_splits(
    folder: Path,
    splits: dict[str, Iterable[Row]],
    encoding: Encoding,
    choose: _Choose | None,
    workers: int,
    console: Console,
) -> None:
    """Write all splits to a scratch folder, and rename it when it is complete."""
    scratch = folder.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed; we hold the lock
    scratch.mkdir(parents=True)
    stats: dict[str, SplitStats] = {}
    for name, rows in splits.items():
        divide = choose if name == "train" else None
        chunks = in_order(replace(encoding, keyed=divide is not None), groups(located(rows)), workers)
        with console.progress(f"tokenizing {name}", unit=" rows") as bar:
            chunks = _counted(chunks, bar.update)
            if divide is None:
                stats |= _write(((name, chunk) for chunk in chunks), scratch, encoding, [name])
            else:
                stats |= _write(_divided(chunks, scratch, divide), scratch, encoding, [name, "validation"])
    # before the folder is renamed, so that an empty result is never taken from the cache
    refuse_empty(stats, splits)
    # what a recipe can only decide with all rows known, such as the numbers of class names
    paths = {name: scratch / f"{name}.arrow" for name, split in stats.items() if split.kept}
    was_held_out = "validation" in stats and "validation" not in splits
    for name, fingerprint in encoding.recipe.finish(paths, was_held_out, encoding.options).items():
        stats[name].fingerprint = fingerprint
    # stats.json is written last, and the folder renamed at once: an entry that has it is complete
    (scratch / "stats.json").write_text(json.dumps({name: asdict(split) for name, split in stats.items()}))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _counted(chunks: Iterable[Chunk], progress: Callable[[int], Any]) -> Iterator[Chunk]:
    for chunk in chunks:
        progress(chunk.bad + chunk.records)
        yield chunk


def _divided(chunks: Iterable[Chunk], scratch: Path, choose: _Choose) -> Iterator[tuple[str, Chunk]]:
    """Divide chunks into train and validation.

    The choice needs the keys of all rows. Until they are known, the tokens are stored in a file instead of in memory.
    """
    keys, waiting = [], []
    path = scratch / "undivided.arrow"
    sources_path = RowSources(path).path
    with ColumnWriter(path, piece=0) as sequences, ColumnWriter(sources_path, piece=0) as row_sources:
        for chunk in chunks:
            if chunk.sequences is not None and chunk.row_sources is not None:
                sequences.write(chunk.sequences)
                row_sources.write(chunk.row_sources)
            keys.append(chunk.keys)
            waiting.append(replace(chunk, sequences=None, row_sources=None, keys=np.empty(0, np.uint64)))
    chosen = choose(np.concatenate(keys) if keys else np.empty(0, np.uint64))
    keys.clear()
    sequence_batches, source_batches = read_batches(path), read_batches(sources_path)
    start = 0
    for chunk in waiting:
        if len(chunk.record):
            chunk = replace(chunk, sequences=next(sequence_batches), row_sources=next(source_batches))
        is_validation = chosen[start : start + chunk.records]
        start += chunk.records
        yield "train", replace(chunk.subset(~is_validation), bad=chunk.bad, seen=chunk.seen)
        yield "validation", chunk.subset(is_validation)
    path.unlink()
    sources_path.unlink()


def _write(chunks: Iterable[tuple[str, Chunk]], folder: Path, encoding: Encoding, names: list[str]) -> dict[str, SplitStats]:
    """Write each chunk to the file of its split; `names` are the splits that may occur, the main one first."""
    block = encoding.options.max_length if encoding.recipe.cut_into_blocks else None
    with contextlib.ExitStack() as files:
        writers = {
            name: files.enter_context(_SplitWriter(folder / f"{name}.arrow", block, name == "train")) for name in names
        }
        for name, chunk in chunks:
            writers[name].write(chunk)
        # a single row cannot be divided: then there is no validation split
        return {name: writer.finish() for name, writer in writers.items() if name == names[0] or writer.stats.rows}


class _SplitWriter:
    """Writes the tokens and the row sources of a split chunk by chunk, and counts."""

    def __init__(self, path: Path, block: int | None, training: bool) -> None:
        """Open the files.

        Args:
            path: of the tokens.
            block: cut the tokens into blocks of this size; None keeps rows.
            training: leave out a shorter last block, unless there is no other.
        """
        self.stats, self.training = SplitStats(), training
        self.cutter = BlockCutter(block) if block else None
        self.columns, self.row_sources = ColumnWriter(path), ColumnWriter(RowSources(path).path, piece=1 << 20)
        self.row_sources.write(RowSources.batch([], []))  # so that the file has columns even without rows

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.columns.__exit__(*error)
        self.row_sources.__exit__(*error)

    def write(self, chunk: Chunk) -> None:
        """Add a chunk."""
        self.stats.count(chunk)
        if chunk.sequences is None or chunk.row_sources is None:
            return
        self.row_sources.write(chunk.row_sources)
        if self.cutter is None:
            self.columns.write(chunk.sequences)
        else:
            self._write_blocks(self.cutter.cut(view(chunk.sequences.column("input_ids").flatten())))

    def _write_blocks(self, blocks: np.ndarray) -> None:
        """Write blocks, an array of shape (blocks, size)."""
        if blocks.size:
            offsets = np.arange(0, blocks.size + 1, blocks.shape[-1], dtype=np.int32)
            ids = pa.ListArray.from_arrays(offsets, blocks.ravel())
            self.columns.write(pa.record_batch({"input_ids": ids, "labels": ids}))

    def finish(self) -> SplitStats:
        """Write what is left, and return the counts."""
        stats = self.stats
        if self.cutter is not None:
            rest = self.cutter.rest
            if len(rest) == 1 or (self.training and self.columns.rows):  # one token has no next one to learn
                stats.tail = len(rest)
            else:
                self._write_blocks(rest[None])
            stats.supervised = stats.tokens - stats.tail
            stats.kept = stats.kept if self.columns.rows else 0
        # taken before `finish` may rewrite the file; _write_splits then replaces it
        stats.fingerprint = self.columns.fingerprint if stats.kept else ""
        stats.largest_id = self.columns.largest
        return stats
