"""Which rows is a finished run measured on? Its own splits as it made them, or another data set's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsrecipes.config.parse import read_config
from dsrecipes.config.sources import paths_of
from dsrecipes.data.questions import plain, question_record, sources
from dsrecipes.data.records import Records, record_hash
from dsrecipes.data.renamed import OptionalColumns
from dsrecipes.data.row import LocatedRows, Row
from dsrecipes.data.sources import SourceRows, prepare_source, source_rows
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from dsrecipes.inference.finished import FinishedRun
    from dsrecipes.io.console import Console

SPLITS = ("test", "validation", "train")
"""In the order in which an evaluation looks for rows."""


@dataclass(frozen=True)
class Item:
    """One row of a split."""

    where: str
    """File and row."""
    row: Row
    """The row as the file has it."""
    record: dict[str, Any]
    """The result of the recipe's format_row."""
    source: str = ""
    """Its data set's name, where a run has several."""


def counted(items: list[Item], task: str) -> list[Item]:
    """The rows that count: those of weight 0 are left out, as in training, and a classifier's rows without a label."""
    # A hub data set may have rows without a label.
    return [
        item
        for item in items
        if item.record.get("weight") != 0 and (task != "labels" or item.record.get("label", "") is not None)
    ]


@dataclass
class EvaluationRows:
    """The rows of a run, or of another data set read by the run's recipe, by split."""

    run: FinishedRun
    dataset: str | None = None
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        """Read the files' rows; nothing is tokenized yet."""
        layers = self.run.config.layers
        if self.dataset:
            # All rows of a file, in the file's own splits: what the run held out concerns its own data only.
            changed: dict[str, Any] = {
                "dataset": self.dataset,
                "dataset_config": None,
                "eval_dataset": None,
                "subjects": None,
            }
            changed |= {"validation_split": 0, "split": "official", "skip_bad_rows": self.skip_bad_rows}
            layers = self.run.layers(**changed)
        self.recipe = self.run.recipe(layers, config=read_config(layers))
        data = self.recipe.config.data
        if self.dataset:
            # --columns describes the run's own data; other rows need not have these columns.
            data.columns = OptionalColumns(self.run.config.data.columns)
        # As lists: a generator can be read only once, and rows are read several times.
        self.by_source: list[SourceRows] = [
            replace(
                part,
                splits={name: list(rows) if isinstance(rows, Iterator) else rows for name, rows in part.splits.items()},
            )
            for part in source_rows(data, self.recipe.load_source)
        ]

    @property
    def name(self) -> str:
        """The data set's name, or the names of several."""
        return paths_of(self.recipe.config.data.sources)

    @property
    def splits(self) -> list[str]:
        """Splits that have rows, in the order in which an evaluation looks for them."""
        return [name for name in SPLITS if self._with(name)]

    def _with(self, split: str) -> list[SourceRows]:
        """The sources that have rows of a split."""
        return [part for part in self.by_source if split in part.splits or (split == "validation" and part.held_out)]

    def choose(self, split: str | None) -> str:
        """The split that is given; else test, validation or, of a data set given by hand, its only one.

        Raises:
            UserError: the data have no such split, or the run held out nothing.
        """
        known = self.splits
        if not known:
            raise UserError("DSR481", f"{self.name}: none of its rows has a label")
        if split:
            return _require(split, known, self.name)
        if known[0] == "train" and not self.dataset:
            raise UserError(
                "DSR482",
                f"{self.run.folder.path}: this run held out no rows; name some with --dataset, or give --split train",
            )
        return known[0]

    def items(self, split: str) -> list[Item]:
        """A split's rows, including those that the run held out of its training rows.

        Raises:
            UserError: a bad row, where the run did not skip such rows.
        """
        several = self.recipe.config.data.is_mixture
        return [
            replace(item, source=part.source.name if several else "")
            for part in self._with(split)
            for item in self._items_of(part, split)
        ]

    def _items_of(self, part: SourceRows, split: str) -> list[Item]:
        held = part.held_out if split != "test" else 0.0

        def row_and_record(row: Row) -> dict[str, Any]:
            return {"row": getattr(row, "original", row), "record": self.run.recipe.format_row(row)}

        records = Records(row_and_record, part.splits["train" if held else split], part.data.skip_bad_rows)
        if not held:
            return [Item(where, **pair) for where, pair in records]
        # Read twice, so that only the rows of the split are in memory.
        keys = np.fromiter((record_hash(pair["record"]) for _, pair in records), np.uint64)
        chosen = part.hold_out(keys, held, self.recipe.config.train["seed"]) == (split == "validation")
        return [Item(where, **pair) for (where, pair), is_chosen in zip(records, chosen, strict=True) if is_chosen]

    def sequences(self, split: str, console: Console) -> dict[str, Path]:
        """Files of a split's token ids and labels by source, exactly as a training run on these rows evaluates them."""
        return {part.source.name: self._sequences_of(part, split, console) for part in self._with(split)}

    def _sequences_of(self, part: SourceRows, split: str, console: Console) -> Path:
        from dsrecipes.model.checks import check_splits

        name = split
        # A training split loses its last, incomplete block; under the name test all rows are measured.
        if self.dataset and split == "train":
            part, name = replace(part, splits={"test": part.splits[split]}), "test"
        prepared = prepare_source(self.run.recipe, part, self.run.tokenizer, self.recipe.config.train["seed"], console)
        if name not in prepared:
            raise UserError("DSR483", f"{part.source.path}: no row of {split} is left; --split names another")
        check_splits({split: prepared[name]}, self.run.tokenizer, self.run.embedding_rows)
        return prepared[name].path


@dataclass
class QuestionRows:
    """Files of four-way questions for a model that writes, by the splits that their names show."""

    name: str
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        """Read all files."""
        self.raw: dict[str, list[tuple[str, Row]]] = {}
        for split, rows in sources(self.name, []):
            self.raw.setdefault(split, []).extend(rows)

    def choose(self, split: str | None) -> str:
        """The split that is given; else test, validation or train (UserError: no such split)."""
        known = [name for name in SPLITS if name in self.raw]
        return _require(split, known, self.name) if split else known[0]

    def items(self, split: str) -> list[Item]:
        """A split's questions (UserError: a bad row)."""
        records = Records(question_record, LocatedRows(self.raw[split]), self.skip_bad_rows)
        return [Item(where, {}, record) for where, record in records]

    def shots(self, items: list[Item], split: str, count: int) -> dict[str, list[dict[str, Any]]]:
        """The first `count` training questions (TMMLU+ and MMLU call them dev) of each subject of the items.

        Raises:
            UserError: there are too few, or they are the items themselves.
        """
        if not count:
            return {}
        if "train" not in self.raw or split == "train":
            raise UserError("DSR485", f"--num_fewshot {count}: {self.name} has no dev questions apart from those measured")
        by_subject: dict[str, list[dict[str, Any]]] = {}
        for item in self.items("train"):
            by_subject.setdefault(item.record["subject"], []).append(item.record)
        for subject in sorted({item.record["subject"] for item in items}):
            available = len(by_subject.get(subject, []))
            if available < count:
                raise UserError("DSR485", f"--num_fewshot {count}: {subject} has {available} dev questions")
        return {subject: records[:count] for subject, records in by_subject.items()}


def _require(split: str, known: list[str], name: str) -> str:
    if split not in known:
        raise UserError("DSR484", f"--split {split}: {name} has no such rows; it has {', '.join(known)}")
    return split


_LINE = 40
"""Shortest line in characters that two documents do not share by chance."""


def contents(record: dict[str, Any]) -> list[str]:
    """Texts by which two records count as the same, letter case and spacing aside.

    The question without its options; an instruction or a chat without its answers; a text without its label; the longer
    lines of a plain text.
    """
    if "question" in record:
        return [plain(record["question"])]
    if "messages" in record:
        return [plain("".join(turn["content"] for turn in record["messages"] if turn["role"] != "assistant"))]
    if "instruction" in record:
        return [plain(record["instruction"] + record.get("input", ""))]
    if "label" in record and "text" in record:
        return [plain("\n".join(record[name] for name in ("text", "text_pair") if name in record))]
    if isinstance(record.get("text"), str):
        return [line for line in map(plain, record["text"].splitlines()) if len(line) >= _LINE]
    # A record of an unknown format must be equal to count as the same.
    return [str(record_hash(record))]
