"""How good are the answers to four-way questions: accuracy by subject, calibration, confusion of letters?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dsrecipes.data.questions import LETTERS, SUBJECTS, UNGROUPED

Json = dict[str, Any]
_BINS = 10


def accuracy(predictions: ArrayLike, references: ArrayLike, subjects: Sequence[str]) -> Json:
    """Share of right answers over all, by group of subjects and by subject.

    Args:
        predictions: the index of the chosen option of each question.
        references: the index of the right one.
        subjects: the subject of each question; one that neither TMMLU+ nor MMLU has belongs to no group.
    """
    right = np.asarray(predictions) == np.asarray(references)
    groups = [SUBJECTS.get(subject, UNGROUPED) for subject in subjects]
    return {
        "accuracy": float(right.mean()),
        "accuracy_by_group": _means(right, groups),
        "accuracy_by_subject": _means(right, subjects),
    }


def _means(right: np.ndarray, names: Sequence[str]) -> dict[str, Json]:
    """name -> {"accuracy", "questions"}."""
    table = np.array(names)
    return {
        name: {"accuracy": float(right[table == name].mean()), "questions": int((table == name).sum())}
        for name in sorted(set(names))
    }


def calibration(confidences: Sequence[float], right: Sequence[bool]) -> Json:
    """Expected calibration error in ten bins of equal width (Guo et al., arXiv:1706.04599, equation 3).

    Args:
        confidences: the probability of each chosen answer.
        right: whether it was right.
    """
    confidence, correct = np.array(confidences), np.array(right, dtype=float)
    # Bins include their upper edge, as in the paper; a confidence of 0 belongs to the first.
    bin_of = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    bins = []
    for number in range(_BINS):
        inside = bin_of == number
        # An empty bin has no mean.
        if inside.any():
            bins.append(
                {
                    "above": number / _BINS,
                    "questions": int(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(correct[inside].mean()),
                }
            )
    error = sum(entry["questions"] * abs(entry["accuracy"] - entry["confidence"]) for entry in bins) / len(correct)
    return {"calibration_error": float(error), "bins": bins}


def item_accuracy(items: list[Json], names: list[str]) -> Json:
    """`accuracy` of measured questions."""
    predictions, references = _indices(items)
    return accuracy(predictions, references, [item["subject"] for item in items])


def item_calibration(items: list[Json], names: list[str]) -> Json:
    """`calibration` of measured questions."""
    return calibration([max(item["probabilities"]) for item in items], [item["acc"] == 1 for item in items])


def item_confusion(items: list[Json], names: list[str]) -> Json:
    """Counts of (right letter, chosen letter), 4 x 4."""
    predictions, references = _indices(items)
    confusion = np.zeros((len(LETTERS), len(LETTERS)), dtype=int)
    # `confusion[...] += 1` would count a repeated pair only once.
    np.add.at(confusion, (references, predictions), 1)
    return {"confusion": confusion.tolist()}


def _indices(items: list[Json]) -> tuple[list[int], list[int]]:
    return [LETTERS.index(item["predicted"]) for item in items], [LETTERS.index(item["answer"]) for item in items]


def accuracy_lines(figures: Json) -> Iterator[str]:
    """Tables by group and by subject."""
    for kind in ("group", "subject"):
        yield f"\n{kind:<48}accuracy  questions"
        for name, row in figures[f"accuracy_by_{kind}"].items():
            yield f"{name:<48}{row['accuracy']:>8.3f}{row['questions']:>11,}"


def confusion_lines(figures: Json) -> Iterator[str]:
    """The table of right and chosen letters."""
    yield "\nanswer    said A   said B   said C   said D"
    for letter, counts in zip(LETTERS, figures["confusion"], strict=True):
        yield f"{letter:<6}" + "".join(f"{count:>9,}" for count in counts)


def calibration_lines(figures: Json) -> Iterator[str]:
    """The bins of the calibration error."""
    yield "\nsure of its answer   accuracy  questions"
    for entry in figures["bins"]:
        yield f"{entry['confidence']:<21.3f}{entry['accuracy']:>8.3f}{entry['questions']:>11,}"
