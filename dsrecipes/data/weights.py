"""Weights in the loss: of a row or turn (a `weight` field), and of classes (--class_weights)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from dsrecipes.data.columns import view
from dsrecipes.data.encode import IGNORE
from dsrecipes.errors import UserError, nearest

WEIGHTS = "weights"
"""Column of a prepared split and key of a batch. Causal: one number a label, or none where all are 1; else one a row."""
BALANCED = "balanced"
_FORMS = "numbers by class (1 5), NAME=NUMBER or INDEX=NUMBER (0=1,1=5), or balanced"


# ---- rows ----


def as_weight(value: Any, name: str = "field 'weight'") -> float:
    """A weight as a number; true is 1, false is 0, and None or empty text, which tables have for a missing cell, is 1.

    Raises:
        ValueError: not a finite number of 0 or more.
    """
    text = value.strip().lower() if isinstance(value, str) else value
    if text in (None, "", "true"):
        return 1.0
    try:
        weight = 0.0 if text == "false" else float(text)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be a weight (a number of 0 or more, true or false), found {value!r}")
    return weight


def row_weight(row: Mapping[str, Any]) -> dict[str, float]:
    """The entry `weight` of a record, empty where the row has none.

    Raises:
        ValueError: the row's `weight` is not a finite number of 0 or more.
    """
    return {"weight": as_weight(row["weight"])} if row.get("weight") not in (None, "") else {}


def row_weights(records: list[dict]) -> list[float]:
    """Column `weights` of a recipe with one label a row."""
    return [record.get("weight", 1.0) for record in records]


def normalize_weights(batch: dict[str, list]) -> None:
    """Make labels of weight 0 IGNORE, weights elsewhere than at a label 0, and weights that are all 1 an empty list.

    Raises:
        UserError: the recipe gave a row another number of weights than of labels.
    """
    for index, weights in enumerate(batch.get(WEIGHTS, ())):
        labels = batch["labels"][index]
        if not isinstance(weights, list) or not weights:
            continue
        if len(weights) != len(labels):
            raise UserError(f"the recipe's encode gave a row {len(labels)} labels and {len(weights)} weights: fix it")
        batch["labels"][index] = labels = [
            label if weight else IGNORE for label, weight in zip(labels, weights, strict=True)
        ]
        # the first token is nobody's next one, so its label is not learned
        learned = [0.0, *(0.0 if label == IGNORE else weight for label, weight in zip(labels[1:], weights[1:], strict=True))]
        batch[WEIGHTS][index] = learned if set(learned) - {0, 1} else []


def other_weights(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of a column of normalized weights: which sequences weigh other than 1, and the weights that their labels have."""
    numbers = view(column.flatten() if pa.types.is_list(column.type) else column)
    if not pa.types.is_list(column.type):
        return numbers != 1, numbers[numbers != 1]
    return np.diff(view(column.offsets)) > 0, numbers[numbers > 0]


# ---- classes ----


def parse_class_weights(words: list[str]) -> str | list[float] | dict[str, float]:
    """The value of --class_weights: BALANCED, weights in label order, or weights by class name or index.

    Raises:
        ValueError: neither of these; a weight that is negative or not finite; no weight above 0.
    """
    text = " ".join(words).strip()
    if text.lower() == BALANCED:
        return BALANCED
    pairs = _pairs(words)
    weights = [_class_weight(text, weight) for _, weight in pairs]
    names = [name for name, _ in pairs if name is not None]
    if not any(weights) and not names:  # a class that is not named weighs 1
        raise ValueError(f"--class_weights {text}: no class would be trained on; give one a weight above 0")
    if not names:
        return weights
    if len(set(names)) < len(pairs):
        raise ValueError(f"--class_weights {text}: give each class one weight, all by name or all in order")
    return dict(zip(names, weights, strict=True))


def _pairs(words: list[str]) -> list[tuple[str | None, Any]]:
    """(class, weight) of each entry; the class is None where weights come in order."""
    text = " ".join(words).strip()
    if text[:1] in ("{", "["):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--class_weights {text}: not JSON ({error}); give {_FORMS}") from None
        return list(value.items()) if isinstance(value, dict) else [(None, weight) for weight in value]
    parts = [part.strip() for word in words for part in word.split(",")]
    # a name may hold spaces: only several entries in one word are cut at them
    entries = [entry for part in parts for entry in ([part] if part.count("=") == 1 else part.split())]
    triples = [entry.rpartition("=") for entry in entries]
    return [(name.strip() if equals else None, weight) for name, equals, weight in triples]


def _class_weight(text: str, value: Any) -> float:
    if value in (None, ""):
        raise ValueError(f"--class_weights {text}: give {_FORMS}")
    try:
        return as_weight(value, "a weight")
    except ValueError as error:
        raise ValueError(f"--class_weights {text}: {error}; give {_FORMS}") from None


def class_weights(words: list[str], labels: np.ndarray, names: list[str]) -> np.ndarray:
    """Weights of the classes in label order.

    `balanced` is scikit-learn's compute_class_weight: rows / (classes x rows of the class), over the classes that have
    training rows; any other class gets 1. A class that a mapping leaves out gets 1 too.

    Args:
        words: the value of --class_weights.
        labels: of the training rows.
        names: of the classes, in label order.

    Raises:
        UserError: labels that are not one class a row, another number of weights than of classes, an unknown class.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError("--class_weights: these rows do not have one class each, so classes cannot be weighted; drop it")
    asked = parse_class_weights(words)
    weights = np.ones(len(names), dtype=np.float64)
    if isinstance(asked, list):
        if len(asked) != len(names):
            raise UserError(f"--class_weights has {len(asked)} numbers for {len(names)} classes: {', '.join(names)}")
        weights[:] = asked
    elif isinstance(asked, dict):
        indices = [_class_index(name, names) for name in asked]
        if len(set(indices)) < len(indices):
            raise UserError(f"--class_weights {' '.join(words)}: a class has two weights, by name and by index; give one")
        weights[indices] = list(asked.values())
    else:
        counts = np.bincount(labels, minlength=len(names))
        present = counts > 0
        weights[present] = len(labels) / (present.sum() * counts[present])
    if not weights[np.unique(labels)].any():
        raise UserError(f"--class_weights {' '.join(words)}: every class that has training rows weighs 0")
    return weights.astype(np.float32)


def _class_index(name: str, names: list[str]) -> int:
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise UserError(
        f"--class_weights {name}: no such class{nearest(name, names)}; the classes are "
        f"{', '.join(f'{index} ({name})' for index, name in enumerate(names))}"
    )
