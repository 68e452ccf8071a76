"""Text classification: one label, several labels or a number a row, with an encoder or a decoder.

dsrecipes train seq_classification --dataset reviews.csv
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import EvalPrediction, PreTrainedTokenizerBase

from dsrecipes.base import Metrics, RecipeBase
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.columns import ColumnWriter, read_batches, read_columns
from dsrecipes.data.fields import as_text
from dsrecipes.data.provenance import RowSources
from dsrecipes.data.renamed import RenamedRows
from dsrecipes.data.rows import Row
from dsrecipes.data.split import Split
from dsrecipes.data.usage import LowerNames, name_format
from dsrecipes.data.weights import row_weight, row_weights
from dsrecipes.errors import UserError, plural

ONE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"
"""Kinds of label, by transformers' name (config.problem_type)."""
PAIRS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("text1", "text2"), ("sentence_a", "sentence_b"), ("question", "sentence"), ("question", "answer"), ("query", "passage"),
)  # fmt: skip
"""Columns of two texts that are classified together."""
TEXTS = (
    "text", "sentence", "content", "review", "comment", "tweet", "review_body", "review_text", "document", "body", "message",
    "question", "query", "input", "title",
)  # fmt: skip
LABELS = (
    "label", "labels", "category", "class", "sentiment", "topic", "intent", "emotion", "target", "score", "stars", "rating",
)  # fmt: skip
_SEPARATORS = re.compile(r"[|;,]")
"""Between the labels in one cell of a table, with --problem_type multi_label_classification."""
_UNNAMED = "LABEL_{}"
"""Name of a label that is a place in a vector of 0 and 1; transformers' own default."""


class SeqClassification(RecipeBase):
    """A text, or two, and its label."""

    auto_class = "AutoModelForSequenceClassification"

    @staticmethod
    def format_row(row: Row) -> dict:
        """{"text", "label"}, perhaps "text_pair" and "weight"; column names in any letter case, label None where there is none."""
        fields = LowerNames(row)
        record = _texts(fields, getattr(row, "mapped", ()))
        name = _label_column(fields, getattr(row, "mapped", ()))
        if name is None:
            raise ValueError(f"no label column: expected one of {', '.join(LABELS)} (the row has: {', '.join(fields)})")
        record["label"] = _label(fields[name], name)
        name_format(row, "texts with labels")
        return record | row_weight(fields)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """One sequence a record, cut at max_length; labels as JSON text, which `finish` replaces by numbers."""
        texts, pairs = _joined(records, tokenizer)
        chosen = dict(tokenizer(texts, pairs, return_attention_mask=False, verbose=False))
        long = [index for index, ids in enumerate(chosen["input_ids"]) if len(ids) > options.max_length]
        if long:
            cut = tokenizer(
                [texts[i] for i in long], pairs and [pairs[i] for i in long], truncation="longest_first",
                max_length=options.max_length, return_attention_mask=False,
            )  # fmt: skip
            for name, values in cut.items():
                for index, value in zip(long, values, strict=True):
                    chosen[name][index] = value
        labels, are_cut = [record["label"] for record in records], set(long)
        return chosen | {
            "labels": [[] if label is None else json.dumps(label, ensure_ascii=False) for label in labels],
            "cut": [int(index in are_cut) for index in range(len(records))],
            "weights": row_weights(records),
        }

    @staticmethod
    def finish(paths: dict[str, Path], held_out: bool, options: EncodeOptions) -> dict[str, str]:
        """Decide from the training labels what they are, and replace the text of each label by its number."""
        known = ["train", "validation"] if held_out else ["train"] if "train" in paths else list(paths)
        texts = {name: pc.unique(read_columns(path).column("labels")).to_pylist() for name, path in paths.items()}
        values = [json.loads(text) for text in dict.fromkeys(text for name in known for text in texts.get(name, []))]
        try:
            kind, names = kind_and_names(values, options.problem_type)
        except ValueError as error:
            raise UserError(str(error)) from None
        fingerprints = {name: _replace_labels(path, texts[name], kind, names) for name, path in paths.items()}
        facts = {"problem_type": kind, "names": names}
        text = json.dumps(facts, ensure_ascii=False)
        next(iter(paths.values())).with_name("labels.json").write_text(text, encoding="utf-8")
        return fingerprints

    def load_rows(self) -> dict[str, Iterable[Row]]:
        """Rows with the names of their classes; a validation or test split without labels is left out."""
        splits = {name: _with_names(rows) for name, rows in super().load_rows().items()}
        for name in ("validation", "test"):
            if name in splits and not _has_labels(splits[name]):
                del splits[name]
                if hasattr(self, "place"):
                    self.place.notes.append(f"the {name} rows have no labels: the split is left out")
        return splits

    def configure(self) -> None:
        """Give the model as many outputs as there are labels, and their names."""
        files = [path for split in self.splits.values() for path in _files(split)]
        texts = {path.with_name("labels.json").read_text(encoding="utf-8") for path in files}
        if len(texts) > 1:
            kinds = [f"{each['problem_type']} of {', '.join(each['names'])}" for each in map(json.loads, sorted(texts))]
            raise UserError(
                f"--dataset: the data sets have different labels ({' and '.join(kinds)}), and each is numbered by itself: put the "
                "files into one folder and name that"
            )
        facts = json.loads(texts.pop())
        kind, names = facts["problem_type"], facts["names"]
        self.model_config.id2label = dict(enumerate(names))
        self.model_config.label2id = {name: index for index, name in enumerate(names)}
        self.model_config.problem_type = kind
        words = {ONE: "one label a row, of", SEVERAL: "several labels a row, of", NUMBER: "a number a row (regression)"}[
            kind
        ]
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        self.place.notes.append(words if kind == NUMBER else f"{words} {plural(len(names), 'class')}: {shown}")
        if "-1" in names:
            self.place.notes.append("-1 is taken as a class; where it means that a row has no label, remove these rows")
        for name, split in self.splits.items():
            cut = sum(pc.sum(read_columns(path).column("cut")).as_py() for path in _files(split))
            if cut:
                limit = self.config.data.max_length
                self.place.notes.append(
                    f"{cut:,} of {split.stats.kept:,} {name} rows were cut at {limit} tokens (--max_length)"
                )

    def metrics(self, split: Split) -> Metrics:
        """The figures of `scores`; of one label a row also what always giving the commonest class reaches."""
        kind = str(self.model_config.problem_type)
        names = [self.model_config.id2label[index] for index in range(self.model_config.num_labels)]
        commonest = None
        if kind == ONE:
            labels = [read_columns(path).column("labels") for path in _files(self.splits["train"])]
            commonest = int(
                np.bincount(np.concatenate([np.asarray(chunk) for each in labels for chunk in each.chunks])).argmax()
            )

        def compute(prediction: EvalPrediction) -> dict[str, Any]:
            figures = scores(np.asarray(prediction.predictions), np.asarray(prediction.label_ids), kind, names)
            if commonest is not None:
                figures["accuracy_majority"] = float(np.mean(prediction.label_ids == commonest))
            return figures

        return compute


def _files(split: Split) -> list[Path]:
    """The prepared files of a split: one for each data set."""
    return [part.path for part in getattr(split, "parts", {}).values()] or [split.path]


# ---- rows ----


def _texts(fields: Mapping[str, Any], mapped: Iterable[str]) -> dict[str, str]:
    """The first pair of columns, or the first column of text, that the row has; `text` alone where --columns names it."""
    pairs = PAIRS[:1] if "text" in mapped else PAIRS
    pair = next((pair for pair in pairs if all(name in fields for name in pair)), None)
    names = pair or sorted((name for name in TEXTS if name in fields), key=lambda name: name not in mapped)[:1]
    if not names:
        raise ValueError(f"no text column: expected one of {', '.join(TEXTS)} (the row has: {', '.join(fields)})")
    texts = {}
    for key, name in zip(("text", "text_pair"), names, strict=False):
        texts[key] = as_text(fields[name], f"field {name!r}")
        if not texts[key].strip():
            raise ValueError(f"field {name!r} is empty")
    return texts


def _label_column(fields: Mapping[str, Any], mapped: Iterable[str]) -> str | None:
    present = [name for name in LABELS if name in fields]
    return next((name for name in present if name in mapped), present[0] if present else None)


def _label(value: Any, name: str) -> Any:
    """A label as JSON knows it: text, a number or a list of these; None where the row has no label."""
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("[") and value.endswith("]"):  # a list in a cell of a table
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value
    if isinstance(value, (list, tuple)):
        return [_scalar(each, name) for each in value]
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return _scalar(value, name)


def _scalar(value: Any, name: str) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"field {name!r}: {value} is no label")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"field {name!r} must be a class, a number or a list of classes, found {type(value).__name__}")
    if isinstance(value, str):
        return as_text(value, f"field {name!r}").strip()
    return value


def _has_labels(rows: Iterable[Row]) -> bool:
    """Whether a row has a label; -1 in all rows is how hub data sets publish a test split without them."""
    for row in rows:
        fields = LowerNames(row)
        name = _label_column(fields, getattr(row, "mapped", ()))
        if name is not None and str(fields[name]).strip() not in ("", "None", "nan", "-1", "-1.0"):
            return True
    return False


def _with_names(rows: Iterable[Row], renames: Mapping[str, str] | None = None) -> Iterable[Row]:
    """Rows of a hub data set with the names of its classes in place of their numbers.

    Args:
        renames: columns of the data set that --columns gives another name.
    """
    if isinstance(rows, RenamedRows):
        return replace(rows, rows=_with_names(rows.rows, {column: name for name, column in rows.columns}))
    features = getattr(rows, "features", None)
    if not features:
        return rows
    names = {}
    for column, feature in (getattr(rows, "features", None) or {}).items():
        inner = getattr(feature, "feature", feature)  # of a list of classes
        if (renames or {}).get(column, column).strip().lower() in LABELS and hasattr(inner, "names"):
            names[column] = inner.names
    return rows.with_transform(partial(_named, names)) if names else rows  # type: ignore[attr-defined]


def _named(names: dict[str, list[str]], batch: dict[str, list]) -> dict[str, list]:
    """A batch of columns with names for numbers; -1 is no label."""

    def name(of: list[str], value: Any) -> Any:
        if isinstance(value, list):
            return [name(of, each) for each in value]
        return of[value] if isinstance(value, int) and 0 <= value < len(of) else None

    return batch | {column: [name(of, value) for value in batch[column]] for column, of in names.items() if column in batch}


# ---- tokens and labels ----


def _joined(records: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str] | None]:
    """Texts and their pairs; joined by a line break where the tokenizer would put nothing between them."""
    texts = [record["text"] for record in records]
    if not any("text_pair" in record for record in records):
        return texts, None
    pairs = [record.get("text_pair", "") for record in records]
    if tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False):
        return texts, pairs
    return ["\n".join(filter(None, both)) for both in zip(texts, pairs, strict=True)], None


def kind_and_names(values: list[Any], asked: str = "auto") -> tuple[str, list[str]]:
    """What the training labels are, and the names of the classes in the order of their numbers.

    Args:
        values: the different labels.
        asked: --problem_type.

    Raises:
        ValueError: they could be classes or numbers, or there are fewer than two.
    """
    kind = _kind(values) if asked == "auto" else asked
    if kind == NUMBER:
        return kind, [_UNNAMED.format(0)]
    if kind == SEVERAL:
        if _are_vectors(values):
            return kind, [_UNNAMED.format(index) for index in range(len(values[0]))]
        names = {_name(each) for value in values for each in _several(value)}
    else:
        lists = next((value for value in values if isinstance(value, list)), None)
        if lists is not None:
            raise ValueError(f"--problem_type {kind}: a label is a list ({lists}); give multi_label_classification")
        names = {_name(value) for value in values}
    if len(names) < 2:
        raise ValueError(f"all training labels are {', '.join(names) or 'empty'}: a classifier needs two classes or more")
    try:
        return kind, sorted(names, key=int)
    except ValueError:
        return kind, sorted(names)


def _kind(values: list[Any]) -> str:
    if any(isinstance(value, list) for value in values):
        return SEVERAL
    if all(isinstance(value, int) for value in values):
        return ONE
    numbers = [_number(value) for value in values]
    if None in numbers:
        return ONE
    fractions = any(number != int(number) for number in numbers if number is not None)
    written = any(isinstance(value, str) for value in values)
    if fractions and not written:
        return NUMBER
    if fractions or not written:
        shown = ", ".join(map(str, values[:4]))
        raise ValueError(f"the labels ({shown}, ...) could be numbers or classes: give --problem_type {NUMBER} or {ONE}")
    return ONE


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in _SEPARATORS.split(value) if part.strip()]
    return value if isinstance(value, list) else [value]


def _are_vectors(values: list[Any]) -> bool:
    """Whether all are lists of 0 and 1 of one length, such as [0, 1, 1]."""
    lists = [value for value in values if isinstance(value, list)]
    lengths = {len(value) for value in lists}
    return len(lists) == len(values) and len(lengths) == 1 and min(lengths) > 1 and all(
        not isinstance(each, str) and each in (0, 1) for value in lists for each in value
    )  # fmt: skip


def target(value: Any, kind: str, names: list[str]) -> Any:
    """A label as the loss takes it: the number of its class, a 0 or 1 for each class, or a number.

    Raises:
        ValueError: it is none of the training labels, or not a number.
    """
    if kind == NUMBER:
        number = None if isinstance(value, list) else _number(value)
        if number is None:
            raise ValueError(f"label {value!r} is not a number (--problem_type {NUMBER})")
        return number
    if kind == ONE:
        return _index(value, names)
    if names[0] == _UNNAMED.format(0):
        if not isinstance(value, list) or len(value) != len(names) or any(each not in (0, 1) for each in value):
            raise ValueError(f"label {value!r} is not a list of {len(names)} numbers 0 or 1, as the training labels are")
        return [float(each) for each in value]
    vector = [0.0] * len(names)
    for each in _several(value):
        vector[_index(each, names)] = 1.0
    return vector


def _index(value: Any, names: list[str]) -> int:
    if isinstance(value, list) or _name(value) not in names:
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise ValueError(f"label {value!r} is none of the training labels ({shown})")
    return names.index(_name(value))


def _replace_labels(path: Path, texts: list[str], kind: str, names: list[str]) -> str:
    """Rewrite a file of prepared rows with numbers for the texts of its labels; its new fingerprint.

    Raises:
        UserError: a label that training does not have; names the row.
    """
    column = read_columns(path).column("labels")
    targets = []
    for text in texts:
        try:
            targets.append(target(json.loads(text), kind, names))
        except ValueError as error:
            row = pc.index(column, pa.scalar(text, column.type)).as_py()
            raise UserError(f"{RowSources(path).describe([row])}: {error}. Fix or remove the row") from None
    numbers = pa.array(targets, {ONE: pa.int32(), SEVERAL: pa.list_(pa.float32()), NUMBER: pa.float32()}[kind])
    known, scratch = pa.array(texts, column.type), path.with_suffix(".labelled")
    with ColumnWriter(scratch, piece=0) as writer:
        for batch in read_batches(path):
            index = batch.schema.get_field_index("labels")
            labels = numbers.take(pc.index_in(batch.column(index), value_set=known))
            writer.write(batch.set_column(index, "labels", labels))
    scratch.replace(path)
    return writer.fingerprint


# ---- figures ----


def scores(logits: np.ndarray, labels: np.ndarray, kind: str, names: list[str]) -> dict[str, Any]:
    """Figures of a split, by scikit-learn and scipy; NaN where one is not defined (AUC of rows of one class).

    Args:
        logits: (rows, classes); of a number (rows, 1).
        labels: (rows,), or (rows, classes) of 0 and 1.
        kind: ONE, SEVERAL or NUMBER.
        names: of the classes.
    """
    from scipy import stats
    from sklearn import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a figure is not defined, which its NaN says
        if kind == NUMBER:
            values = logits[:, 0].astype(np.float64)
            return {
                "pearson": float(stats.pearsonr(labels, values)[0]) if len(labels) > 1 else math.nan,
                "spearman": float(stats.spearmanr(labels, values)[0]) if len(labels) > 1 else math.nan,
                "mse": float(metrics.mean_squared_error(labels, values)),
            }
        predicted = logits.argmax(-1) if kind == ONE else (logits > 0).astype(int)
        labels = labels.astype(int)
        figures: dict[str, Any] = {"accuracy": float(metrics.accuracy_score(labels, predicted))}
        figures["macro_f1"] = float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
        if kind == SEVERAL:
            figures["micro_f1"] = float(metrics.f1_score(labels, predicted, average="micro", zero_division=0))
            figures["auc"] = float(metrics.roc_auc_score(labels, logits)) if len(labels) else math.nan
        else:
            figures["matthews"] = float(metrics.matthews_corrcoef(labels, predicted))
            if len(names) == 2:
                # the difference of the logits orders rows as the probability does, without its rounding to 1
                figures["auc"] = float(metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
        parts = metrics.precision_recall_fscore_support(
            labels, predicted, labels=range(len(names)), average=None, zero_division=0
        )
    figures["by_label"] = {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}
        for name, precision, recall, f1, rows in zip(names, *parts, strict=True)
    }
    return figures
