"""Text classification: one label, several labels or a number a row, with an encoder or a decoder.

dsrecipes train seq_classification --dataset reviews.csv
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from transformers import EvalPrediction, PretrainedConfig, PreTrainedTokenizerBase

from dsrecipes.base import Metrics, RecipeBase
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.columns import read_columns
from dsrecipes.data.labelled import has_labels, labelled_record, with_class_names
from dsrecipes.data.labels import NUMBER, ONE, SEVERAL, list_names, number_labels
from dsrecipes.data.row import Row
from dsrecipes.data.sources import MixedSplit
from dsrecipes.data.split import Split
from dsrecipes.data.weights import row_weights
from dsrecipes.errors import UserError, coded, plural
from dsrecipes.evaluation.label_scores import label_scores

_KIND_NOTES = {ONE: "one label a row, of", SEVERAL: "several labels a row, of", NUMBER: "a number a row (regression)"}
"""What the header says of each kind of label; the classes follow."""


class SeqClassification(RecipeBase):
    """A text, or two, and its label.

    What the labels are is known only after all rows are read: encode keeps their text, `finish` gives them numbers, and
    `configure` fits the model's head to them.
    """

    auto_class = "AutoModelForSequenceClassification"

    @staticmethod
    def format_row(row: Row) -> dict:
        """{"text", "label"}, perhaps "text_pair" and "weight"; data/labelled.py lists the names of columns."""
        return labelled_record(row)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """One sequence a record, cut at max_length; labels as JSON text, which `finish` replaces by numbers."""
        batch, cut = _tokens(records, tokenizer, options.max_length)
        labels = [record["label"] for record in records]
        return batch | {
            "labels": [[] if label is None else json.dumps(label, ensure_ascii=False) for label in labels],
            "cut": [int(index in cut) for index in range(len(records))],
            "weights": row_weights(records),
        }

    @staticmethod
    def finish(paths: dict[str, Path], held_out: bool, options: EncodeOptions) -> dict[str, str]:
        """Decide from the training labels what they are, and replace the text of each label by its number."""
        # held-out rows are training rows too, and a rare class may be only among them
        if held_out:
            decisive = ["train", "validation"]
        elif "train" in paths:
            decisive = ["train"]
        else:
            decisive = list(paths)
        try:
            fingerprints, kind, names = number_labels(paths, decisive, options.problem_type)
        except ValueError as error:
            raise UserError("DSR600", str(error)) from None
        # beside the prepared files, since a later run takes these from the cache without calling finish
        text = json.dumps({"problem_type": kind, "names": names}, ensure_ascii=False)
        next(iter(paths.values())).with_name("labels.json").write_text(text, encoding="utf-8")
        return fingerprints

    def load_rows(self) -> dict[str, Iterable[Row]]:
        """Rows with the names of their classes; a validation or test split without labels is left out."""
        splits = {name: with_class_names(rows) for name, rows in super().load_rows().items()}
        for name in ("validation", "test"):
            if name in splits and not has_labels(splits[name]):
                del splits[name]
                self.notes.append(f"the {name} rows have no labels: the split is left out")
        return splits

    def configure(self, model_config: PretrainedConfig, splits: dict[str, Split | MixedSplit]) -> None:
        """Give the model as many outputs as there are labels, and their names."""
        kind, names = _read_labels([path for split in splits.values() for path in _files(split)])
        model_config.id2label = dict(enumerate(names))
        model_config.label2id = {name: index for index, name in enumerate(names)}
        model_config.problem_type = kind  # type: ignore[assignment]  # a Literal of the three kinds
        classes = "" if kind == NUMBER else f" {plural(len(names), 'class')}: {list_names(names)}"
        self.notes.append(_KIND_NOTES[kind] + classes)
        # test splits of GLUE and others have -1 where a label is withheld
        if "-1" in names:
            note = "-1 is taken as a class; where it means that a row has no label, remove these rows"
            self.notes.append(coded("DSR603", note))
        limit = self.config.data.max_length
        for name, split in splits.items():
            cut = sum(pc.sum(read_columns(path).column("cut")).as_py() for path in _files(split))
            # a note, not a refusal: the beginning of a text often suffices for its class
            if cut:
                note = f"{cut:,} of {split.stats.kept:,} {name} rows were cut at {limit} tokens (--max_length)"
                self.notes.append(coded("DSR604", note))

    def metrics(self, split: Split | MixedSplit, train: Split | MixedSplit, model_config: PretrainedConfig) -> Metrics:
        """The figures of `label_scores`; with one label a row also the accuracy of always giving the most common class."""
        kind = str(model_config.problem_type)
        names = list((model_config.id2label or {}).values())
        most_common = _most_common_class(_files(train)) if kind == ONE else None

        def compute(prediction: EvalPrediction) -> dict[str, Any]:
            figures = label_scores(np.asarray(prediction.predictions), np.asarray(prediction.label_ids), kind, names)
            if most_common is not None:
                figures["accuracy_majority"] = float(np.mean(prediction.label_ids == most_common))
            return figures

        return compute


def _files(split: Split | MixedSplit) -> list[Path]:
    """The prepared files of a split: one for each data set."""
    return [split.path] if isinstance(split, Split) else [part.path for part in split.parts.values()]


def _read_labels(files: list[Path]) -> tuple[str, list[str]]:
    """The kind of the labels and the names of the classes, which `finish` wrote beside each prepared file.

    Raises:
        UserError: the data sets of a mixture have different labels.
    """
    texts = {path.with_name("labels.json").read_text(encoding="utf-8") for path in files}
    if len(texts) > 1:
        kinds = [f"{facts['problem_type']} of {', '.join(facts['names'])}" for facts in map(json.loads, sorted(texts))]
        raise UserError(
            "DSR602",
            f"--dataset: the data sets have different labels ({' and '.join(kinds)}), and each set is numbered separately: put "
            "the files into one folder and give that",
        )
    facts = json.loads(texts.pop())
    return facts["problem_type"], facts["names"]


def _most_common_class(files: list[Path]) -> int:
    columns = [read_columns(path).column("labels") for path in files]
    labels = np.concatenate([np.asarray(chunk) for column in columns for chunk in column.chunks])
    return int(np.bincount(labels).argmax())


def _tokens(records: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[dict[str, Any], set[int]]:
    """The tokenizer's columns, and which records were cut.

    Only long records are tokenized with truncation: it makes the tokenizer report what it cut, row by row.
    """
    texts, pairs = _joined(records, tokenizer)
    batch = dict(tokenizer(texts, pairs, return_attention_mask=False, verbose=False))
    long = [index for index, ids in enumerate(batch["input_ids"]) if len(ids) > max_length]
    if long:
        shortened = tokenizer(
            [texts[index] for index in long],
            pairs and [pairs[index] for index in long],
            truncation="longest_first",
            max_length=max_length,
            return_attention_mask=False,
        )
        for name, values in shortened.items():
            for index, value in zip(long, values, strict=True):
                batch[name][index] = value
    return batch, set(long)


def _joined(records: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str] | None]:
    """Texts and their pairs; joined by a line break where the tokenizer would put nothing between them."""
    texts = [record["text"] for record in records]
    if not any("text_pair" in record for record in records):
        return texts, None
    pairs = [record.get("text_pair", "") for record in records]
    if tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False):
        return texts, pairs
    return ["\n".join(filter(None, both)) for both in zip(texts, pairs, strict=True)], None
