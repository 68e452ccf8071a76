"""Which columns of a row hold the text and the label of a classifier?

Column names are matched in any letter case; --columns comes first. Hub data sets give classes as numbers, which are replaced
by their names here, so that a saved model shows names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dsrecipes.data.fields import as_text
from dsrecipes.data.renamed import RenamedRows
from dsrecipes.data.row import Row
from dsrecipes.data.usage import LowerNames, name_format
from dsrecipes.data.weights import row_weight

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("sentence_a", "sentence_b"),
    ("question", "sentence"),
    ("question", "answer"),
    ("query", "passage"),
)
"""Columns of two texts that are classified together."""
TEXTS = (
    "text sentence content review comment tweet review_body review_text document body message question query input title"
).split()
LABELS = "label labels category class sentiment topic intent emotion target score stars rating".split()
_NO_LABEL = ("", "None", "nan", "-1", "-1.0")
"""How files write that a row has no label; -1 in all rows is how hub data sets publish a test split without them."""


def labelled_record(row: Row) -> dict[str, Any]:
    """Read a row as {"text", "label"}, perhaps with "text_pair" and "weight"; label None where the row has none.

    Raises:
        ValueError: no column of text or none of labels, or a value that is neither; names the field.
    """
    fields, mapped = LowerNames(row), getattr(row, "mapped", ())
    record: dict[str, Any] = _texts(fields, mapped)
    name = _label_column(fields, mapped)
    if name is None:
        raise ValueError(f"no label column: expected one of {', '.join(LABELS)} (the row has: {', '.join(fields)})")
    record["label"] = _label(fields[name], name)
    name_format(row, "texts with labels")
    return record | row_weight(fields)


def _texts(fields: Mapping[str, Any], mapped: Iterable[str]) -> dict[str, str]:
    """Read the first pair of columns, or the first column of text, that the row has; `text` alone where --columns names it."""
    # --columns text=... may leave a column such as `question` in the row, which must not become half of a pair
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
    """Convert a label to what JSON knows: text, a number or a list of these; None where the row has no label."""
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("[") and value.endswith("]"):  # a list in a cell of a table
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value
    # a list is a set of classes or a vector of 0 and 1; labels.py decides when all labels are known
    if isinstance(value, (list, tuple)):
        return [_scalar(entry, name) for entry in value]
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return _scalar(value, name)


def _scalar(value: Any, name: str) -> Any:
    # as JSON writes it, so that true and the text "true" are one class
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"field {name!r}: {value} is no label")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"field {name!r} must be a class, a number or a list of classes, found {type(value).__name__}")
    if isinstance(value, str):
        return as_text(value, f"field {name!r}").strip()
    return value


def has_labels(rows: Iterable[Row]) -> bool:
    """Return whether any row has a label."""
    for row in rows:
        fields = LowerNames(row)
        name = _label_column(fields, getattr(row, "mapped", ()))
        if name is not None and str(fields[name]).strip() not in _NO_LABEL:
            return True
    return False


def with_class_names(rows: Iterable[Row], renames: Mapping[str, str] | None = None) -> Iterable[Row]:
    """Replace the class numbers in the rows of a hub data set by the names of the classes.

    Args:
        rows: of any kind; those without `features` are returned as they are.
        renames: columns of the data set that --columns gives another name.
    """
    if isinstance(rows, RenamedRows):
        return replace(rows, rows=with_class_names(rows.rows, {column: name for name, column in rows.columns}))
    names = {}
    for column, feature in (getattr(rows, "features", None) or {}).items():
        inner = getattr(feature, "feature", feature)  # of a list of classes
        if (renames or {}).get(column, column).strip().lower() in LABELS and hasattr(inner, "names"):
            names[column] = inner.names
    # with_transform renames when a row is read; map would write the data set to the disk again
    return rows.with_transform(partial(_name_classes, names)) if names else rows  # type: ignore[attr-defined]


def _name_classes(names: dict[str, list[str]], batch: dict[str, list]) -> dict[str, list]:
    """Replace class numbers by class names in a batch of columns; -1 is no label."""

    def name(classes: list[str], value: Any) -> Any:
        if isinstance(value, list):
            return [name(classes, entry) for entry in value]
        return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None

    return batch | {
        column: [name(classes, value) for value in batch[column]] for column, classes in names.items() if column in batch
    }
