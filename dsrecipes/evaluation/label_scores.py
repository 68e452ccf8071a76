"""How good are the labels that a classifier gives: accuracy, F1, AUC, correlations, confusion?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsrecipes.data.labels import NUMBER, ONE, SEVERAL

Json = dict[str, Any]
_MISTAKES = 10
"""Kinds of mistakes that are listed, the most frequent first."""


def label_scores(logits: np.ndarray, labels: np.ndarray, kind: str, names: list[str]) -> Json:
    """Figures of a split, by scikit-learn and scipy; NaN where one is not defined (AUC of rows of one class).

    Args:
        logits: (rows, classes); for numbers (rows, 1).
        labels: (rows,), or (rows, classes) of 0 and 1.
        kind: ONE, SEVERAL or NUMBER.
        names: of the classes.
    """
    with warnings.catch_warnings():
        # scikit-learn warns of undefined figures, which NaN shows in the result.
        warnings.simplefilter("ignore")
        if kind == NUMBER:
            return _number_scores(logits[:, 0].astype(np.float64), labels)
        return _class_scores(logits, labels.astype(int), kind, names)


def _number_scores(values: np.ndarray, labels: np.ndarray) -> Json:
    from scipy import stats
    from sklearn import metrics

    # scipy raises where there are not two rows to correlate.
    several = len(labels) > 1
    return {
        "pearson": float(stats.pearsonr(labels, values)[0]) if several else math.nan,
        "spearman": float(stats.spearmanr(labels, values)[0]) if several else math.nan,
        "mse": float(metrics.mean_squared_error(labels, values)),
    }


def _class_scores(logits: np.ndarray, labels: np.ndarray, kind: str, names: list[str]) -> Json:
    from sklearn import metrics

    # For several labels, a logit above 0 is a probability above one half.
    predicted = logits.argmax(-1) if kind == ONE else (logits > 0).astype(int)
    figures: Json = {"accuracy": float(metrics.accuracy_score(labels, predicted))}
    figures["macro_f1"] = float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
    if kind == SEVERAL:
        figures["micro_f1"] = float(metrics.f1_score(labels, predicted, average="micro", zero_division=0))
        figures["auc"] = float(metrics.roc_auc_score(labels, logits)) if len(labels) else math.nan
    else:
        figures["matthews"] = float(metrics.matthews_corrcoef(labels, predicted))
        if len(names) == 2:
            # The difference of the logits orders rows as the probability does, without its rounding to 1.
            figures["auc"] = float(metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    columns = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(len(names)), average=None, zero_division=0
    )
    figures["by_label"] = {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}
        for name, precision, recall, f1, rows in zip(names, *columns, strict=True)
    }
    return figures


def item_scores(items: list[Json], names: list[str]) -> Json:
    """`label_scores` of measured rows."""
    logits, labels = (np.array([item[name] for item in items]) for name in ("logits", "target"))
    return label_scores(logits, labels, _kind_of(items), names)


def _kind_of(items: list[Json]) -> str:
    """Find the kind of the labels by the type of their targets."""
    first = items[0]["target"]
    if isinstance(first, list):
        return SEVERAL
    return NUMBER if isinstance(first, float) else ONE


def item_confusion(items: list[Json], names: list[str]) -> Json:
    """Counts of (label, predicted label), where a row has one label."""
    if _kind_of(items) != ONE:
        return {}
    logits, labels = (np.array([item[name] for item in items]) for name in ("logits", "target"))
    confusion = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(confusion, (labels, logits.argmax(-1)), 1)
    return {"confusion": confusion.tolist()}


def score_lines(figures: Json) -> Iterator[str]:
    """The table by label; of numbers there is none."""
    if "by_label" not in figures:
        return
    columns = ("precision", "recall", "f1")
    yield f"\n{'label':<32}" + "".join(f"{name:>11}" for name in columns) + f"{'rows':>9}"
    for name, row in figures["by_label"].items():
        yield f"{name:<32}" + "".join(f"{row[column]:>11.3f}" for column in columns) + f"{row['rows']:>9,}"


def mistake_lines(figures: Json) -> Iterator[str]:
    """The most frequent mistakes."""
    mistakes = [
        (count, label, predicted)
        for label, counts in zip(figures.get("by_label", ()), figures.get("confusion", ()), strict=False)
        for predicted, count in zip(figures["by_label"], counts, strict=True)
        if count and label != predicted
    ]
    if mistakes:
        yield "\nmost frequent mistakes"
    for count, label, predicted in sorted(mistakes, key=lambda mistake: -mistake[0])[:_MISTAKES]:
        yield f"{count:>7,}  {label} taken for {predicted}"
