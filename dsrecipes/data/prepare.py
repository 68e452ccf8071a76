"""Rows to token files, once per content: cached, written by one rank while the others wait on a lock file."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from dsrecipes.data.columns import fingerprint_columns, write_columns
from dsrecipes.data.encode import IGNORE, EncodeOptions
from dsrecipes.data.files import Row, fingerprint
from dsrecipes.data.origin import Origins, origins_path
from dsrecipes.data.pack import blocks
from dsrecipes.data.records import Chosen, Records, content_of, encode_group, hold_out
from dsrecipes.errors import UserError, plural
from dsrecipes.runs.console import Console

if TYPE_CHECKING:
    from datasets import Dataset

    from dsrecipes.base import RecipeBase

_BATCH = 512


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
    fingerprint: str = ""
    """Of the tokens and labels, in their order."""
    notes: dict[str, int] = field(default_factory=dict)
    """Lines for the header -> rows that they hold for."""


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


def cache_root() -> Path:
    """DSRECIPES_CACHE, else dsrecipes/ below XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DSRECIPES_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsrecipes"


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
) -> dict[str, Split]:
    """Format, encode and write each split, or find it in the cache.

    Raises:
        UserError: a row at fault (with its place), no rows, or no row with a token to train on.
    """
    known = [name for name in ("train", "validation", "test") if name in splits]
    splits = {name: list(splits[name]) if isinstance(splits[name], Iterator) else splits[name] for name in known}
    held_out = validation_split if "validation" not in splits else 0.0
    key = _cache_key(recipe, splits, tokenizer, options, held_out, seed if held_out else 0, skip_bad_rows)
    folder = cache_root() / "data" / key
    if not (folder / "stats.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _let_rank_zero_begin(folder)
        with FileLock(f"{folder}.lock"):
            if not (folder / "stats.json").is_file():
                _write_splits(folder, recipe, splits, tokenizer, options, held_out, seed, skip_bad_rows, console)
    return _read_splits(folder)


def _cache_key(recipe: type, splits: dict[str, Iterable[Row]], tokenizer: PreTrainedTokenizerBase, *settings: Any) -> str:
    here = Path(__file__).parent
    parts = [
        *(inspect.getsource(sys.modules[name]) for name in _own_modules(recipe)),
        *(path.read_text(encoding="utf-8") for path in sorted(here.glob("*.py"))),
        *(f"{name}={fingerprint(rows)}" for name, rows in splits.items()),
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        str(tokenizer.chat_template),
        repr(settings),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


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
    recipe: type[RecipeBase],
    splits: dict[str, Iterable[Row]],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    held_out: float,
    seed: int,
    skip_bad_rows: bool,
    console: Console,
) -> None:
    scratch = folder.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    stats = {}
    for name, rows in splits.items():
        records = Records(recipe.format_row, rows, skip_bad_rows)
        parts: dict[str, Callable[[int], bool]] = {name: lambda _: True}
        if name == "train" and held_out:
            out = hold_out([content_of(record) for _, record in records], held_out, seed)
            if out:
                parts = {"train": lambda i, out=out: i not in out, "validation": lambda i, out=out: i in out}
        for part, wanted in parts.items():
            chosen = Chosen(records, wanted)
            stats[part] = _write(scratch / f"{part}.arrow", recipe, chosen, tokenizer, options, console, part)
            if part == name:  # rows held out of it are no rows of another file
                stats[part].dropped = {**records.dropped, **stats[part].dropped}
    _refuse_empty(stats)
    (scratch / "stats.json").write_text(json.dumps({name: asdict(each) for name, each in stats.items()}))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _read_splits(folder: Path) -> dict[str, Split]:
    stats = json.loads((folder / "stats.json").read_text())
    return {name: Split(folder / f"{name}.arrow", SplitStats(**each)) for name, each in stats.items() if each["kept"]}


def _write(
    path: Path,
    recipe: type[RecipeBase],
    records: Chosen,
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    console: Console,
    split: str,
) -> SplitStats:
    stats, origins = SplitStats(), Origins()
    with console.progress(f"tokenizing {split}", unit=" rows") as bar:
        encoded = _encoded(recipe, records, tokenizer, options, stats, origins, bar.update)
        write_columns(
            path, _blocked(encoded, options.max_length, stats, split == "train") if recipe.cut_into_blocks else encoded
        )
    stats.fingerprint = fingerprint_columns(path) if stats.kept else ""
    origins.write(origins_path(path))
    return stats


def _encoded(
    recipe: type[RecipeBase],
    records: Chosen,
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    stats: SplitStats,
    origins: Origins,
    progress: Callable[[int], Any],
) -> Iterator[dict[str, list]]:
    """Batches of encoded rows that have a token to train on and are not too long."""
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for group in _batches(records, _BATCH):
        rows = len(group)
        batch, group = encode_group(recipe, group, tokenizer, options, records.skip_bad_rows)
        dropped["unencodable row"] += rows - len(group)
        notes.update(batch.pop("notes", ()))
        records = batch.pop("record", range(len(group)))
        keep = []
        for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            length = _length(ids)
            supervised = _supervised(labels) if isinstance(labels, list) else 1
            if length > options.max_length and not recipe.cut_into_blocks:
                dropped[f"longer than {options.max_length} tokens"] += 1
            elif not supervised and not recipe.cut_into_blocks:
                dropped["nothing to learn from"] += 1
            else:
                keep.append(index)
                tokens = _total(ids)
                origins.add(group[records[index]][0], tokens)
                stats.tokens += tokens
                stats.supervised += supervised
        stats.rows += rows
        stats.kept += len(keep)
        stats.dropped = {reason: count for reason, count in dropped.items() if count}
        stats.notes = dict(notes)
        progress(rows)
        if keep:
            yield {name: [values[index] for index in keep] for name, values in batch.items()}


def _blocked(batches: Iterable[dict[str, list]], size: int, stats: SplitStats, equal: bool) -> Iterator[dict[str, list]]:
    """Blocks of `size` tokens. Of training rows a last shorter block is left out and counted, unless it is all."""
    streams = (ids for batch in batches for ids in batch["input_ids"])
    wrote = False
    for group in _batches(blocks(streams, size), _BATCH):
        if len(group[-1]) < size and ((equal and (wrote or len(group) > 1)) or len(group[-1]) == 1):
            stats.tail = len(group.pop())
        if group:
            wrote = True
            yield {"input_ids": group, "labels": group}
    stats.supervised = stats.tokens - stats.tail
    stats.kept = stats.kept if wrote else 0


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _supervised(labels: list[int]) -> int:
    """Labels that are learned; the first token is nobody's next one."""
    return len(labels) - 1 - labels.count(IGNORE) + (labels[0] == IGNORE) if labels else 0


def _length(ids: list) -> int:
    return max(map(len, ids), default=0) if ids and isinstance(ids[0], list) else len(ids)


def _total(ids: list) -> int:
    return sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


def _refuse_empty(stats: dict[str, SplitStats]) -> None:
    for name in ("train", *(name for name in stats if name != "train")):
        split = stats.get(name)
        if split is None:
            raise UserError(f"the data set has no training rows (it has: {', '.join(stats) or 'nothing'})")
        if split.kept:
            continue
        why = dropped_words(split.dropped)
        if not split.rows and not split.dropped:
            raise UserError(f"the {name} data are empty: no rows were found")
        raise UserError(
            f"no {name} row has a token to train on: {plural(split.rows or sum(split.dropped.values()), 'row')}"
            + (f" dropped ({why})" if why else "")
            + "; raise --max_length or mend the data"
        )


def dropped_words(dropped: dict[str, int]) -> str:
    """`2 bad rows, 1 longer than 512 tokens`: reasons are rows, or what rows are."""
    words = (plural(count, why) if why.endswith("row") else f"{count:,} {why}" for why, count in dropped.items())
    return ", ".join(words)
