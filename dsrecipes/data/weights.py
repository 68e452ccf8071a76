"""Weights in the loss: of a row or turn (a `weight` field), and of classes (--class_weights)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from dsrecipes.config.values import as_weight, parse_class_weights
from dsrecipes.data.columns import view
from dsrecipes.data.encode import IGNORE
from dsrecipes.errors import UserError, nearest

WEIGHTS = "weights"
"""Column of a prepared split and key of a batch. Causal: one number a label, or none where all are 1; else one a row."""


# ---- rows ----


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
