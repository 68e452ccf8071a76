"""Rows to token files, once per content: cached, written by one rank while the others wait on a lock file."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.chunk import Chunk, Encoding, groups
from dsrecipes.data.columns import ColumnWriter, read_batches, view
from dsrecipes.data.files import Row, fingerprint, located
from dsrecipes.data.origin import origins, origins_path
from dsrecipes.data.pack import BlockCutter
from dsrecipes.data.records import hold_out
from dsrecipes.data.seen import Seen
from dsrecipes.data.weights import WEIGHTS, other_weights
from dsrecipes.data.workers import cores, in_order
from dsrecipes.errors import UserError, plural
from dsrecipes.io.console import Console
from dsrecipes.io.paths import cache_root

if TYPE_CHECKING:
    from datasets import Dataset

    from dsrecipes.base import RecipeBase


@dataclass
class SplitStats:
    """What became of a split's rows; tokens are counted before packing and without padding."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    supervised: int = 0
    tail: int = 0
    """Tokens of a last block shorter than max_length, not trained on."""
    weighted: int = 0
    """Rows that weigh other than 1, or have a turn that does."""
    weight_range: list[float] = field(default_factory=list)
    """Smallest and largest weight in those rows; empty without such rows."""
    fingerprint: str = ""
    """Of the tokens, labels and weights, in their order."""
    largest_id: int | None = None
    """The greatest token id; None where it is not known."""
    seen: Seen = field(default_factory=Seen)
    """Forms and unused columns; of held-out rows among those of the split that they come from."""
    notes: dict[str, int] = field(default_factory=dict)
    """Lines for the header -> rows that they hold for."""

    def __post_init__(self) -> None:
        """Rebuild what stats.json holds as a plain object."""
        if isinstance(self.seen, dict):
            self.seen = Seen(**self.seen)

    def count(self, chunk: Chunk) -> None:
        """Add a chunk's rows and tokens."""
        self.rows += chunk.records
        self.seen.merge(chunk.seen)
        for why, count in [("bad row", chunk.bad), *((why, len(rows)) for why, rows in chunk.dropped.items())]:
            if count:
                self.dropped[why] = self.dropped.get(why, 0) + count
        for note, rows in chunk.notes.items():
            if rows:
                self.notes[note] = self.notes.get(note, 0) + len(rows)
        if chunk.origins is not None:
            self.kept += len(np.unique(chunk.record))
            self.tokens += int(view(chunk.origins.column("tokens")).sum())
            self.supervised += int(chunk.supervised.sum())
        if chunk.sequences is not None and WEIGHTS in chunk.sequences.schema.names:
            self._count_weights(chunk.sequences.column(WEIGHTS), chunk.record)

    def _count_weights(self, column: pa.Array, record: np.ndarray) -> None:
        others, weights = other_weights(column)
        if others.any():
            self.weighted += len(np.unique(record[others]))
            numbers = [*self.weight_range, float(weights.min()), float(weights.max())]
            self.weight_range = [min(numbers), max(numbers)]


@dataclass
class Split:
    """A prepared split: an Arrow file of one row a sequence, with input_ids and labels."""

    path: Path
    stats: SplitStats

    @cached_property
    def data(self) -> Dataset:
        """Its rows as a datasets.Dataset; training reads the file without one."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path))


HoldOut = Callable[[np.ndarray, float, int], np.ndarray]
"""(keys, share, seed) -> which records are held out."""


def prepare(
    recipe: type[RecipeBase],
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
    """Format, encode and write each split, or find it in the cache.

    Args:
        hold_out: chooses the held-out records by their keys, the share and the seed.
        workers: processes that format and encode; None: one for each core, and none for few rows. The result is the same.

    Raises:
        UserError: a row at fault (with its place), no rows, or no row with a token to train on.
    """
    known = [name for name in ("train", "validation", "test") if name in splits]
    splits = {name: list(splits[name]) if isinstance(splits[name], Iterator) else splits[name] for name in known}
    held_out = validation_split if "validation" not in splits else 0.0
    key = _cache_key(recipe, splits, tokenizer, options, held_out, seed if held_out else 0, skip_bad_rows, hold_out.__name__)
    folder = cache_root() / "data" / key
    if not (folder / "stats.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _let_rank_zero_begin(folder)
        with FileLock(f"{folder}.lock"):
            if not (folder / "stats.json").is_file():
                encoding = Encoding(recipe, tokenizer, options, skip_bad_rows)
                choose = partial(hold_out, share=held_out, seed=seed) if held_out else None
                _write_splits(folder, splits, encoding, choose, workers or cores(), console)
    return _read_splits(folder)


def _cache_key(recipe: type, splits: dict[str, Iterable[Row]], tokenizer: PreTrainedTokenizerBase, *settings: Any) -> str:
    here = Path(__file__).parent
    parts = [
        *(inspect.getsource(sys.modules[name]) for name in _own_modules(recipe)),
        *(path.read_text(encoding="utf-8") for path in sorted(here.glob("*.py"))),
        *(f"{name}={fingerprint(rows)}" for name, rows in splits.items()),
        describe_tokenizer(tokenizer),
        repr(settings),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """All of a tokenizer that changes ids, without the truncation and padding that its last call has left set."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # each call of the tokenizer sets them again
        backend.no_padding()
        vocabulary = backend.to_str()
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    named = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return "\0".join([vocabulary, named, str(tokenizer.chat_template)])


def _own_modules(recipe: type) -> list[str]:
    """The recipe's modules and what they import beside installed packages: code that may change its tokens."""
    found = [each.__module__ for each in recipe.__mro__ if each.__module__ not in ("abc", "builtins")]
    for name in found:  # grows while it is walked
        for value in vars(sys.modules[name]).values():
            other = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            file = getattr(sys.modules.get(other or ""), "__file__", None) or ""
            installed = file.startswith((sys.prefix, sys.base_prefix)) or "site-packages" in file
            if file.endswith(".py") and not installed and not str(other).startswith("dsrecipes.") and other not in found:
                found.append(str(other))
    return sorted(set(found))


def _let_rank_zero_begin(folder: Path) -> None:
    """The first rank of a host takes the lock, so that the one that may print shows the progress bar."""
    patience = time.monotonic() + 20
    while int(os.environ.get("LOCAL_RANK", 0)) and time.monotonic() < patience:
        if folder.is_dir() or Path(f"{folder}.lock").exists():
            return
        time.sleep(0.1)


def _write_splits(
    folder: Path,
    splits: dict[str, Iterable[Row]],
    encoding: Encoding,
    choose: Callable[[np.ndarray], np.ndarray] | None,
    workers: int,
    console: Console,
) -> None:
    scratch = folder.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    stats = {}
    for name, rows in splits.items():
        keyed = choose is not None and name == "train"
        chunks = in_order(replace(encoding, keyed=keyed), groups(located(rows)), workers)
        with console.progress(f"tokenizing {name}", unit=" rows") as bar:
            chunks = _counted(chunks, bar.update)
            parts = _hold_out(chunks, scratch, choose) if keyed else ((name, chunk) for chunk in chunks)
            stats |= _write(parts, scratch, encoding, [name, *(["validation"] if keyed else [])])
    _refuse_empty(stats, splits)
    paths = {name: scratch / f"{name}.arrow" for name, split in stats.items() if split.kept}
    was_held_out = "validation" in stats and "validation" not in splits
    for name, digest in encoding.recipe.finish(paths, was_held_out, encoding.options).items():
        stats[name].fingerprint = digest
    (scratch / "stats.json").write_text(json.dumps({name: asdict(split) for name, split in stats.items()}))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _counted(chunks: Iterable[Chunk], progress: Callable[[int], Any]) -> Iterator[Chunk]:
    for chunk in chunks:
        progress(chunk.bad + chunk.records)
        yield chunk


def _hold_out(
    chunks: Iterable[Chunk], scratch: Path, choose: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[str, Chunk]]:
    """Chunks divided into train and validation, which can begin when all rows are known: until then they are on disk."""
    keys, kept = [], []
    path = scratch / "undivided.arrow"
    with ColumnWriter(path, piece=0) as sequences, ColumnWriter(origins_path(path), piece=0) as places:
        for chunk in chunks:
            if chunk.sequences is not None and chunk.origins is not None:
                sequences.write(chunk.sequences)
                places.write(chunk.origins)
            keys.append(chunk.keys)
            kept.append(replace(chunk, sequences=None, origins=None, keys=np.empty(0, np.uint64)))
    chosen = choose(np.concatenate(keys) if keys else np.empty(0, np.uint64))
    keys.clear()
    sequence_batches, place_batches = read_batches(path), read_batches(origins_path(path))
    start = 0
    for chunk in kept:
        if len(chunk.record):
            chunk = replace(chunk, sequences=next(sequence_batches), origins=next(place_batches))
        validation = chosen[start : start + chunk.records]
        start += chunk.records
        yield "train", replace(chunk.of(~validation), bad=chunk.bad, seen=chunk.seen)
        yield "validation", chunk.of(validation)
    path.unlink()
    origins_path(path).unlink()


def _write(chunks: Iterable[tuple[str, Chunk]], folder: Path, encoding: Encoding, names: list[str]) -> dict[str, SplitStats]:
    """Write each chunk into the file of its split."""
    block = encoding.options.max_length if encoding.recipe.cut_into_blocks else None
    with contextlib.ExitStack() as files:
        parts = {name: files.enter_context(_SplitWriter(folder / f"{name}.arrow", block, name == "train")) for name in names}
        for name, chunk in chunks:
            parts[name].write(chunk)
        # nothing was held out of one row: there is no validation split
        return {name: part.finish() for name, part in parts.items() if name == names[0] or part.stats.rows}


class _SplitWriter:
    """Writes a split's tokens and places while they are made, and counts."""

    def __init__(self, path: Path, block: int | None, training: bool) -> None:
        """`block`: cut the tokens into blocks; of training rows a last shorter one is left out, unless it is all."""
        self.stats, self.training = SplitStats(), training
        self.cutter = BlockCutter(block) if block else None
        self.columns, self.places = ColumnWriter(path), ColumnWriter(origins_path(path), piece=1 << 20)
        self.places.write(origins([], []))

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.columns.__exit__(*error)
        self.places.__exit__(*error)

    def write(self, chunk: Chunk) -> None:
        """Add a chunk."""
        self.stats.count(chunk)
        if chunk.sequences is None or chunk.origins is None:
            return
        self.places.write(chunk.origins)
        if self.cutter is None:
            self.columns.write(chunk.sequences)
        else:
            self._write_blocks(self.cutter.cut(view(chunk.sequences.column("input_ids").flatten())))

    def _write_blocks(self, blocks: np.ndarray) -> None:
        if blocks.size:
            offsets = np.arange(0, blocks.size + 1, blocks.shape[1], dtype=np.int32)
            ids = pa.ListArray.from_arrays(offsets, blocks.ravel())
            self.columns.write(pa.record_batch({"input_ids": ids, "labels": ids}))

    def finish(self) -> SplitStats:
        """What was written; nothing can be added."""
        stats = self.stats
        if self.cutter is not None:
            rest = self.cutter.rest
            if len(rest) == 1 or (self.training and self.columns.rows):
                stats.tail = len(rest)
            else:
                self._write_blocks(rest[None])
            stats.supervised = stats.tokens - stats.tail
            stats.kept = stats.kept if self.columns.rows else 0
        stats.fingerprint = self.columns.fingerprint if stats.kept else ""
        stats.largest_id = self.columns.largest
        return stats


def _read_splits(folder: Path) -> dict[str, Split]:
    stats = json.loads((folder / "stats.json").read_text())
    return {name: Split(folder / f"{name}.arrow", SplitStats(**each)) for name, each in stats.items() if each["kept"]}


def _refuse_empty(stats: dict[str, SplitStats], splits: Mapping[str, Iterable[Row]]) -> None:
    for name, split in stats.items():
        if split.kept:
            continue
        why = dropped_words(split.dropped)
        if not split.rows and not split.dropped:
            rows = splits.get(name)
            files = getattr(getattr(rows, "rows", rows), "files", ())
            where = f"{files[0]}: " if len(files) == 1 else ""
            raise UserError(f"{where}the {name} data are empty: no rows were found")
        raise UserError(
            f"no {name} row has a token to train on: {plural(split.rows or sum(split.dropped.values()), 'row')}"
            + (f" dropped ({why})" if why else "")
            + "; raise --max_length or mend the data"
        )


def dropped_words(dropped: dict[str, int]) -> str:
    """`2 bad rows, 1 longer than 512 tokens`: reasons are rows, or what rows are."""
    words = (plural(count, why) if why.endswith("row") else f"{count:,} {why}" for why, count in dropped.items())
    return ", ".join(words)
