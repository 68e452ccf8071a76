"""How much does a row, a turn or a class count in the loss? The `weight` field, and --class_weights.

A causal recipe has a weight for each label; a recipe with one label a row has a weight for each row.
"""

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
"""Column of a prepared split, and key of a batch. Causal: a number for each label, or none where all are 1; else one a row."""


# ---- rows ----


def row_weight(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the entry `weight` of a record, empty where the row has none.

    Raises:
        ValueError: the row's `weight` is not a finite number of 0 or more.
    """
    return {"weight": as_weight(row["weight"])} if row.get("weight") not in (None, "") else {}


def row_weights(records: list[dict]) -> list[float]:
    """Return the column `weights` of a recipe with one label a row."""
    return [record.get("weight", 1.0) for record in records]


def normalize_weights(batch: dict[str, list]) -> None:
    """Bring the weights of a batch into one form, in place.

    Labels of weight 0 become IGNORE, weights where there is no label become 0, and weights that are all 1 an empty list.

    Raises:
        UserError: the recipe returned another number of weights than of labels for a row.
    """
    for index, weights in enumerate(batch.get(WEIGHTS, ())):
        labels = batch["labels"][index]
        # a number is the weight of a row with one label, which needs no change
        if not isinstance(weights, list) or not weights:
            continue
        if len(weights) != len(labels):
            raise UserError(
                "DSR104",
                f"the recipe's encode returned {len(labels)} labels and {len(weights)} weights for a row: fix encode",
            )
        batch["labels"][index] = labels = [
            label if weight else IGNORE for label, weight in zip(labels, weights, strict=True)
        ]
        # the first token is predicted from nothing, so its label is not learned
        behind_first = zip(labels[1:], weights[1:], strict=True)
        learned = [0.0, *(0.0 if label == IGNORE else weight for label, weight in behind_first)]
        batch[WEIGHTS][index] = learned if set(learned) - {0, 1} else []


def other_weights(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Find the sequences with weights other than 1 in a column of normalized weights.

    Returns:
        True for each such sequence, and the weights of the labels in them.
    """
    numbers = view(column.flatten() if pa.types.is_list(column.type) else column)
    if not pa.types.is_list(column.type):
        return numbers != 1, numbers[numbers != 1]
    return np.diff(view(column.offsets)) > 0, numbers[numbers > 0]


# ---- classes ----


def class_weights(words: list[str], labels: np.ndarray, names: list[str]) -> np.ndarray:
    """Compute the weights of the classes in label order.

    `balanced` is scikit-learn's compute_class_weight: rows / (classes x rows of the class), over the classes with training
    rows; other classes get 1. A class that a mapping leaves out gets 1 too.

    Args:
        words: the value of --class_weights.
        labels: of the training rows.
        names: of the classes, in label order.

    Raises:
        UserError: rows do not have one class each, the number of weights is wrong, or a class is unknown.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            "DSR170", "--class_weights: these rows do not have one class each, so classes cannot be weighted; drop the flag"
        )
    # a list in label order, a mapping by name or index, or `balanced`
    given = parse_class_weights(words)
    weights = np.ones(len(names), dtype=np.float64)
    if isinstance(given, list):
        if len(given) != len(names):
            raise UserError(
                "DSR171", f"--class_weights has {len(given)} numbers for {len(names)} classes: {', '.join(names)}"
            )
        weights[:] = given
    elif isinstance(given, dict):
        indices = [_class_index(name, names) for name in given]
        if len(set(indices)) < len(indices):
            raise UserError(
                "DSR172", f"--class_weights {' '.join(words)}: a class has two weights, by name and by index; give one"
            )
        weights[indices] = list(given.values())
    else:
        counts = np.bincount(labels, minlength=len(names))
        present = counts > 0
        weights[present] = len(labels) / (present.sum() * counts[present])
    # a mean over weights that are all 0 would be NaN
    if not weights[np.unique(labels)].any():
        raise UserError("DSR173", f"--class_weights {' '.join(words)}: every class with training rows has the weight 0")
    return weights.astype(np.float32)


def _class_index(name: str, names: list[str]) -> int:
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise UserError(
        "DSR174",
        f"--class_weights {name}: no such class{nearest(name, names)}; the classes are "
        f"{', '.join(f'{index} ({name})' for index, name in enumerate(names))}",
    )
