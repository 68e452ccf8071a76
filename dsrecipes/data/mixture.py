"""Several data sets in one run: each is prepared by itself, and a mixture draws other rows of each in every epoch."""

from __future__ import annotations

import contextlib
import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsrecipes.config.sources import Source
from dsrecipes.data.collate import PADDING_ROW, Features, Sequences
from dsrecipes.data.files import Row
from dsrecipes.data.pack import pack
from dsrecipes.data.prepare import HoldOut, Split, SplitStats, prepare
from dsrecipes.data.records import hold_out, hold_out_alone
from dsrecipes.data.renamed import renamed
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dsrecipes.base import RecipeBase
    from dsrecipes.config.schema import DataConfig
    from dsrecipes.io.console import Console


# ---- rows ----


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source by split, and the recipe with this source's settings alone."""

    source: Source
    story: RecipeBase
    splits: dict[str, Iterable[Row]]
    holds_out: bool
    """Whether --validation_split applies to it, where it has no validation rows of its own."""
    hold_out: HoldOut = hold_out_alone
    """Chooses the rows that are held out."""

    @property
    def held_out(self) -> float:
        """The share of the training rows that are held out for validation."""
        return self.story.config.data.validation_split if self.holds_out and "validation" not in self.splits else 0.0


@contextlib.contextmanager
def named(source: Source) -> Iterator[None]:
    """Name the source in a UserError that does not show its path."""
    try:
        yield
    except UserError as error:
        if source.path in str(error):
            raise
        raise UserError(f"{source.path}: {error}") from error


def source_rows(story: RecipeBase) -> list[SourceRows]:
    """The rows of each source of a run; a run on one plain data set has one source.

    `split` makes the rows of that split the source's training rows. Where --eval_dataset is given, its sources alone have
    validation rows.

    Raises:
        UserError: a data set cannot be read, or does not have the rows that are asked for.
    """
    data = story.config.data
    if not data.is_mixture:
        return [SourceRows(data.sources[0], story, _loaded(story), holds_out=True, hold_out=hold_out)]
    parts = [_training_rows(story, source) for source in data.sources]
    return [*parts, *(_validation_rows(story, source) for source in data.eval_sources)]


def _loaded(story: RecipeBase) -> dict[str, Iterable[Row]]:
    """The rows that a recipe loads, with its settings applied to them."""
    return dict(renamed(story.load_rows(), story.config.data.columns))


def _training_rows(story: RecipeBase, source: Source) -> SourceRows:
    part = story.of_source(source)
    splits = _loaded(part)
    require_split(source, source.split or "train", splits)
    splits = {"train": splits.pop(source.split or "train")} | {key: rows for key, rows in splits.items() if key != "train"}
    if story.config.data.eval_sources:
        splits.pop("validation", None)
    return SourceRows(source, part, splits, holds_out=not story.config.data.eval_sources)


def _validation_rows(story: RecipeBase, source: Source) -> SourceRows:
    part = story.of_source(source)
    splits = _loaded(part)
    split = source.split or "validation"
    require_split(source, split, splits)
    return SourceRows(source, part, {"validation": splits[split]}, holds_out=False)


def require_split(source: Source, split: str, splits: dict[str, Iterable[Row]]) -> None:
    """Refuse a source without rows of a split (UserError: those that it has)."""
    if split not in splits:
        rows = {"train": "training"}.get(split, split)
        raise UserError(
            f"{source.path} has no {rows} rows, only {', '.join(splits) or 'none'}: name files with --dataset and "
            "--eval_dataset, or another `split`"
        )


def style_notes(data: DataConfig) -> list[str]:
    """Sources whose prompts are not those that chat, generate and judge send."""
    styles = {source.name: source.own.get("prompt_style", data.prompt_style) for source in data.sources}
    return [
        f"{name} trains with prompt_style {style}; chat, generate and judge ask in the run's, {data.prompt_style}"
        for name, style in styles.items()
        if style != data.prompt_style
    ]


# ---- prepared splits ----


@dataclass
class MixedSplit:
    """A split that several sources have, each prepared by itself."""

    parts: dict[str, Split]

    @cached_property
    def stats(self) -> SplitStats:
        """The sums over all sources; the fingerprint covers names and order too."""
        stats = SplitStats()
        for part in self.parts.values():
            for key in ("rows", "kept", "tokens", "supervised", "tail"):
                setattr(stats, key, getattr(stats, key) + getattr(part.stats, key))
            stats.dropped = dict(Counter(stats.dropped) + Counter(part.stats.dropped))
            stats.seen.merge(part.stats.seen)
            stats.notes = dict(Counter(stats.notes) + Counter(part.stats.notes))
            stats.weighted += part.stats.weighted
            spans = [*stats.weight_range, *part.stats.weight_range]
            stats.weight_range = [min(spans), max(spans)] if spans else []
        prints = "\0".join(f"{name} {part.stats.fingerprint}" for name, part in self.parts.items())
        stats.fingerprint = hashlib.sha256(prints.encode()).hexdigest()[:16]
        return stats

    @cached_property
    def data(self) -> Dataset:
        """Rows of all sources, one source after another."""
        from datasets import concatenate_datasets

        return concatenate_datasets([part.data for part in self.parts.values()])


def prepare_source(part: SourceRows, tokenizer: PreTrainedTokenizerBase, console: Console) -> dict[str, Split]:
    """Prepare the rows of one source with its own settings; it has a cache entry of its own."""
    data, train = part.story.config.data, part.story.config.train
    return prepare(
        type(part.story), part.splits, tokenizer, data.encoding,
        validation_split=part.held_out, seed=train["seed"], skip_bad_rows=data.skip_bad_rows, console=console,
        hold_out=part.hold_out,
    )  # fmt: skip


def by_split(prepared: Iterable[tuple[Source, dict[str, Split]]]) -> dict[str, MixedSplit]:
    """Splits of sources as sources of splits, train first."""
    found: dict[str, dict[str, Split]] = {"train": {}, "validation": {}, "test": {}}
    for source, splits in prepared:
        for name, split in splits.items():
            found[name][source.name] = split
    return {name: MixedSplit(parts) for name, parts in found.items() if parts}


# ---- shares ----


def rows_by_epoch(sources: list[Source], available: dict[str, int]) -> dict[str, int] | None:
    """Rows that each source gives to an epoch; None where nobody asked for shares: all rows of each, once.

    `rows` is what it says. The other sources share as many rows as they hold together by `weight`, 1 where only others
    have one, rounded by largest remainder; where no source has a weight, each gives all its rows.

    Raises:
        UserError: a weight is too small for a single row.
    """
    if not any(source.rows or source.weight for source in sources):
        return None
    counts = {source.name: source.rows or available[source.name] for source in sources}
    weighted = [source for source in sources if not source.rows]
    if not any(source.weight for source in weighted):
        return counts
    weights = np.array([source.weight or 1.0 for source in weighted])
    total = sum(available[source.name] for source in weighted)
    exact = total * weights / weights.sum()
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    for source, count in zip(weighted, whole.tolist(), strict=True):
        if not count:
            raise UserError(
                f"{source.path}: weight {source.weight or 1:g} is less than one of the {total:,} rows of an epoch: raise it, "
                "or leave the data set out"
            )
        counts[source.name] = count
    return counts


def draws(rows: int, count: int, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The rows of one source in epoch after epoch, without end.

    An epoch has all rows as often as `count` allows. What is left is drawn without replacement, over epochs too: no row
    comes a second time before each has come once.
    """
    passes, rest = divmod(count, rows)
    whole = np.tile(np.arange(rows), passes)
    waiting, shuffles = np.empty(0, dtype=np.int64), 0
    while True:
        chosen, waiting = waiting[:rest], waiting[rest:]
        if len(chosen) < rest:
            shuffled = np.random.default_rng((*seed, shuffles)).permutation(rows)
            shuffles += 1
            used = np.isin(shuffled, chosen)  # behind the others, so that no epoch draws a row twice
            shuffled = np.concatenate([shuffled[~used], shuffled[used]])
            missing = rest - len(chosen)
            chosen, waiting = np.concatenate([chosen, shuffled[:missing]]), shuffled[missing:]
        yield np.concatenate([whole, chosen])


# ---- sequences ----


class JoinedSequences(Sequences):
    """Sequences of several sources, one source after another, with one numbering of rows."""

    def __init__(self, parts: dict[str, Sequences]) -> None:
        """`parts` by the name of the source."""
        self._parts = parts
        self.weighted = any(part.weighted for part in parts.values())
        self.class_weights = next(iter(parts.values())).class_weights
        self._first_row = np.cumsum([0, *(len(part.row_lengths()) for part in parts.values())])
        self._first = np.cumsum([0, *map(len, parts.values())])
        self.lengths = np.concatenate([part.lengths for part in parts.values()])

    def __getstate__(self) -> dict[str, Any]:
        """The parts know how to travel to data workers."""
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def parts(self) -> dict[str, Sequences]:
        """The sequences of each source."""
        return self._parts

    def row_lengths(self) -> np.ndarray:
        """Tokens of each prepared row."""
        return np.concatenate([part.row_lengths() for part in self._parts.values()])

    def by_file(self, rows: Iterable[int]) -> list[tuple[Path, list[int]]]:
        """Prepared rows by the file that they lie in, with their numbers there."""
        found: dict[Path, list[int]] = {}
        for row in rows:
            part, number = self._located(row, self._first_row)
            found.setdefault(part.path, []).append(number)
        return list(found.items())

    def _located(self, number: int, firsts: np.ndarray) -> tuple[Sequences, int]:
        part = int(np.searchsorted(firsts, number, side="right")) - 1
        return list(self._parts.values())[part], int(number - firsts[part])

    def _row(self, row: int) -> Features:
        part, number = self._located(row, self._first_row)
        (features,) = part.examples([number])
        if self.weighted and WEIGHTS not in features:  # all rows of this source weigh 1, and those of others do not
            labels = np.asarray(features["labels"])  # integers by token; several labels of one row are floats
            by_token = labels.ndim and np.issubdtype(labels.dtype, np.integer)
            features[WEIGHTS] = np.empty(0, np.float32) if by_token else np.float32(1)
        return features

    def rows(self, index: int) -> list[int]:
        """Numbers of the prepared rows in a sequence; a filler has none."""
        if index == PADDING_ROW:
            return []
        place = int(np.searchsorted(self._first, index, side="right")) - 1
        part, number = self._located(index, self._first)
        return [int(self._first_row[place]) + row for row in part.rows(number)]


class Mixture(JoinedSequences):
    """Rows drawn from several sources, other ones in each epoch; a function of seed and epoch alone.

    Sequences are numbered on over epochs: index = epoch x sequences of an epoch + place in it. So a data worker that
    outlives an epoch needs no word of the next one.
    """

    def __init__(self, parts: dict[str, Sequences], counts: dict[str, int], capacity: int | None, seed: int) -> None:
        """Draw and pack the first epoch.

        Args:
            parts: one row to a sequence, by the name of the source.
            counts: rows of an epoch by source.
            capacity: tokens of a packed sequence; None leaves one row to a sequence.
            seed: of the draws.
        """
        super().__init__(parts)
        self._counts, self._capacity, self._seed = counts, capacity, seed
        self._tokens = self.lengths
        self._drawn: tuple[int, list[Iterator[np.ndarray]]] = (0, [])
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._per_epoch = 0
        self.fix_length(1, 1, 0)

    def __getstate__(self) -> dict[str, Any]:
        """Without the iterators, which start again."""
        return vars(self) | {"_drawn": (0, [])}

    @property
    def counts(self) -> dict[str, int]:
        """Rows that an epoch draws, by source."""
        return self._counts

    def fix_length(self, batch: int, epochs: float, max_steps: int) -> None:
        """Let every epoch of the run have as many sequences, for Trainer counts the steps of one.

        It is the number of the epoch that packs worst, in whole steps where there are rows enough; in the others the
        sequences with the most rows are cut in two.

        Args:
            batch: sequences of a step.
            epochs: length of the run, unless `max_steps` above 0 sets it.
        """
        rows = sum(self.counts.values())
        if self._capacity is None:
            self._per_epoch = rows
        else:
            most = epoch = 0
            while epoch < (math.ceil(max_steps / math.ceil(most / batch)) if max_steps > 0 and most else math.ceil(epochs)):
                most, epoch = max(most, len(self._packed(epoch)[1])), epoch + 1
            self._per_epoch = min(rows, math.ceil(most / batch) * batch)
        self._epoch = None
        self.lengths = self.lengths_of(0)

    def lengths_of(self, epoch: int) -> np.ndarray:
        """Tokens of each sequence of an epoch."""
        rows, ends = self._layout(epoch)
        return np.add.reduceat(self._tokens[rows], np.append(0, ends[:-1]))

    def first_of(self, epoch: int) -> int:
        """Index of an epoch's first sequence."""
        return epoch * self._per_epoch

    def rows(self, index: int) -> list[int]:
        """Numbers of the prepared rows in a sequence; a filler has none."""
        if index == PADDING_ROW:
            return []
        epoch, place = divmod(index, self._per_epoch)
        rows, ends = self._layout(epoch)
        return rows[ends[place - 1] if place else 0 : ends[place]].tolist()

    def drawn(self, epoch: int) -> list[np.ndarray]:
        """The rows that an epoch has of each source, by their numbers there."""
        following, iterators = self._drawn
        if following > epoch or not iterators:
            following = 0
            iterators = [
                draws(len(part), self.counts[name], (self._seed, zlib.crc32(name.encode())))
                for name, part in self._parts.items()
            ]
        for _ in range(following, epoch + 1):
            rows = [next(iterator) for iterator in iterators]
        self._drawn = (epoch + 1, iterators)
        return rows

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch in the order of its sequences, and where each sequence ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            rows, ends = self._packed(epoch)
            self._epoch = (epoch, rows, cut_to(ends, self._per_epoch))
        return self._epoch[1:]

    def _packed(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = np.concatenate([first + rows for first, rows in zip(self._first_row, self.drawn(epoch), strict=False)])
        rows = np.random.default_rng((self._seed, epoch)).permutation(drawn)
        if self._capacity is None:
            return rows, np.arange(1, len(rows) + 1)
        bins = pack(self._tokens[rows], self._capacity)
        return rows[bins.rows], bins.starts[1:]


def cut_to(ends: np.ndarray, count: int) -> np.ndarray:
    """Cut sequences of several rows in two, those with the most rows first, until there are `count` of them.

    Args:
        ends: where each sequence ends in the order of rows.
        count: at most the number of rows.
    """
    while len(ends) < count:
        sizes = np.diff(ends, prepend=0)
        longest = np.argsort(-sizes, kind="stable")[: count - len(ends)]
        longest = longest[sizes[longest] > 1]
        ends = np.sort(np.append(ends, ends[longest] - sizes[longest] // 2))
    return ends
