"""Which rows does each data set of a run contribute, and how are they prepared?

`--dataset a.json b.json` names several sources. Each is prepared by itself, with its own settings and its own cache entry, so
that another source in the list changes nothing of it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dsrecipes.config.sources import Source
from dsrecipes.data.encode import RowHooks
from dsrecipes.data.holdout import HoldOut, hold_out, hold_out_alone
from dsrecipes.data.prepare import prepare
from dsrecipes.data.renamed import renamed
from dsrecipes.data.row import Row
from dsrecipes.data.split import Split, SplitStats
from dsrecipes.errors import UserError, coded

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dsrecipes.config.schema import DataConfig
    from dsrecipes.io.console import Console

LoadRows = Callable[[Source], Mapping[str, Iterable[Row]]]
"""Loads the rows of a source by split, with the source's own settings."""


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source by split, and the data settings of a run on this source alone."""

    source: Source
    data: DataConfig
    splits: dict[str, Iterable[Row]]
    holds_out: bool
    """Whether --validation_split applies, where the source has no validation rows of its own."""
    hold_out: HoldOut = hold_out_alone
    """Chooses the held-out rows; by each row alone where there are several sources, which may share rows."""

    @property
    def held_out(self) -> float:
        """The share of the training rows that is held out for validation."""
        return self.data.validation_split if self.holds_out and "validation" not in self.splits else 0.0


@contextlib.contextmanager
def named(source: Source) -> Iterator[None]:
    """Add the path of the source to a UserError that does not name it."""
    try:
        yield
    except UserError as error:
        # most messages begin with the file already
        if source.path in str(error):
            raise
        raise error.at(source.path) from error


def source_rows(data: DataConfig, load: LoadRows) -> list[SourceRows]:
    """Load the rows of each source of a run; a run on one plain data set has one source.

    A source's `split` makes the rows of that split its training rows. Where --eval_dataset is given, only its sources have
    validation rows.

    Args:
        data: settings of the run.
        load: reads a source.

    Raises:
        UserError: a data set cannot be read, or lacks the requested split.
    """
    # a plain data set keeps hold_out, which meets the share exactly; several need a choice that does not depend on the others
    if not data.is_mixture:
        return [SourceRows(data.sources[0], data, _loaded(data.sources[0], data, load), holds_out=True, hold_out=hold_out)]
    training = [_training_rows(source, data, load) for source in data.sources]
    return [*training, *(_validation_rows(source, data, load) for source in data.eval_sources)]


def _loaded(source: Source, data: DataConfig, load: LoadRows) -> dict[str, Iterable[Row]]:
    """Load the rows of a source, under the names that --columns gives their columns."""
    return renamed(dict(load(source)), data.columns)


def _training_rows(source: Source, data: DataConfig, load: LoadRows) -> SourceRows:
    own = data.of_source(source)
    splits = _loaded(source, own, load)
    training = source.split or "train"
    require_split(source, training, splits)
    splits = {"train": splits.pop(training)} | {name: rows for name, rows in splits.items() if name != "train"}
    # --eval_dataset replaces the validation rows of the training sources
    if data.eval_sources:
        splits.pop("validation", None)
    return SourceRows(source, own, splits, holds_out=not data.eval_sources)


def _validation_rows(source: Source, data: DataConfig, load: LoadRows) -> SourceRows:
    own = data.of_source(source)
    splits = _loaded(source, own, load)
    split = source.split or "validation"
    require_split(source, split, splits)
    return SourceRows(source, own, {"validation": splits[split]}, holds_out=False)


def require_split(source: Source, split: str, splits: Mapping[str, Iterable[Row]]) -> None:
    """Refuse a source without rows of a split (UserError)."""
    if split not in splits:
        rows = {"train": "training"}.get(split, split)
        raise UserError(
            "DSR160",
            f"{source.path} has no {rows} rows, only {', '.join(splits) or 'none'}: name files with --dataset and "
            "--eval_dataset, or give the source another `split`",
        )


def style_notes(data: DataConfig) -> list[str]:
    """Note the sources whose prompts differ from those that chat, generate and judge send."""
    styles = {source.name: source.own.get("prompt_style", data.prompt_style) for source in data.sources}
    return [
        coded(
            "DSR162",
            f"{name} trains with prompt_style {style}; chat, generate and judge use the run's, {data.prompt_style}",
        )
        for name, style in styles.items()
        if style != data.prompt_style
    ]


@dataclass
class MixedSplit:
    """A split that several sources have, each prepared by itself."""

    parts: dict[str, Split]
    """By the name of the source."""

    @cached_property
    def stats(self) -> SplitStats:
        """Sums over all sources; the fingerprint covers names and order too."""
        total = SplitStats()
        for part in self.parts.values():
            stats = part.stats
            for key in ("rows", "kept", "tokens", "supervised", "tail", "weighted"):
                setattr(total, key, getattr(total, key) + getattr(stats, key))
            total.dropped = dict(Counter(total.dropped) + Counter(stats.dropped))
            total.notes = dict(Counter(total.notes) + Counter(stats.notes))
            total.seen.merge(stats.seen)
            weights = [*total.weight_range, *stats.weight_range]
            total.weight_range = [min(weights), max(weights)] if weights else []
        fingerprints = "\0".join(f"{name} {part.stats.fingerprint}" for name, part in self.parts.items())
        total.fingerprint = hashlib.sha256(fingerprints.encode()).hexdigest()[:16]
        return total

    @cached_property
    def data(self) -> Dataset:
        """Rows of all sources, one source after another."""
        from datasets import concatenate_datasets

        return concatenate_datasets([part.data for part in self.parts.values()])


def prepare_source(
    recipe: type[RowHooks], part: SourceRows, tokenizer: PreTrainedTokenizerBase, seed: int, console: Console
) -> dict[str, Split]:
    """Prepare the rows of one source with its own settings; `seed` chooses the held-out rows."""
    return prepare(
        recipe,
        part.splits,
        tokenizer,
        part.data.encoding,
        validation_split=part.held_out,
        seed=seed,
        skip_bad_rows=part.data.skip_bad_rows,
        console=console,
        hold_out=part.hold_out,
    )


def by_split(prepared: Iterable[tuple[Source, dict[str, Split]]]) -> dict[str, MixedSplit]:
    """Turn splits by source into sources by split, train first."""
    parts: dict[str, dict[str, Split]] = {"train": {}, "validation": {}, "test": {}}
    for source, splits in prepared:
        for name, split in splits.items():
            parts[name][source.name] = split
    return {name: MixedSplit(splits) for name, splits in parts.items() if splits}
