"""What do the labels of a classifier's rows mean: classes, sets of classes, or numbers?

The training labels decide the kind and the names of the classes. Both are known only when all rows have been read, so a
prepared file first holds each label as JSON text, and `number_labels` rewrites it with the numbers that the loss takes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dsrecipes.data.columns import ColumnWriter, read_batches, read_columns
from dsrecipes.data.provenance import RowSources

ONE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"
"""Kinds of label, by transformers' name (config.problem_type)."""
_SEPARATORS = re.compile(r"[|;,]")
"""Between the labels in one cell of a table, with --problem_type multi_label_classification."""
_UNNAMED = "LABEL_{}"
"""Name of a label that is a position in a vector of 0 and 1; transformers' own default."""
_LISTED = 12
"""Class names that a message lists; there may be hundreds."""


def list_names(names: list[str]) -> str:
    """Join the names of classes for a message, the first twelve of many."""
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def kind_and_names(values: list[Any], problem_type: str = "auto") -> tuple[str, list[str]]:
    """Decide what the training labels are; returns the kind, and the names of the classes in the order of their numbers.

    Args:
        values: the distinct labels.
        problem_type: the flag of this name; auto decides by the labels.

    Raises:
        ValueError: they could be classes or numbers, or there are fewer than two classes.
    """
    kind = _kind(values) if problem_type == "auto" else problem_type
    if kind == NUMBER:
        return kind, [_UNNAMED.format(0)]
    if kind == SEVERAL:
        if _are_vectors(values):
            return kind, [_UNNAMED.format(index) for index in range(len(values[0]))]
        names = {_class_name(label) for value in values for label in _split_labels(value)}
    else:
        lists = next((value for value in values if isinstance(value, list)), None)
        if lists is not None:
            raise ValueError(f"--problem_type {kind}: a label is a list ({lists}); give {SEVERAL}")
        names = {_class_name(value) for value in values}
    if len(names) < 2:
        raise ValueError(f"all training labels are {', '.join(names) or 'empty'}: a classifier needs two classes or more")
    # numbers in numeric order, so that class 10 does not come before class 2
    try:
        return kind, sorted(names, key=int)
    except ValueError:
        return kind, sorted(names)


def _kind(values: list[Any]) -> str:
    """Derive the kind from the labels.

    Fractions are numbers and texts are classes. Whole numbers written with a point, or fractions written as text, could be
    either, so the user must say which.
    """
    if any(isinstance(value, list) for value in values):
        return SEVERAL
    if all(isinstance(value, int) for value in values):
        return ONE
    numbers = [_number(value) for value in values]
    if None in numbers:
        return ONE
    has_fractions = any(number != int(number) for number in numbers if number is not None)
    has_texts = any(isinstance(value, str) for value in values)
    if has_fractions and not has_texts:
        return NUMBER
    if has_fractions or not has_texts:
        examples = ", ".join(map(str, values[:4]))
        raise ValueError(f"the labels ({examples}, ...) could be numbers or classes: give --problem_type {NUMBER} or {ONE}")
    return ONE


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


def _class_name(value: Any) -> str:
    """Return a label as the name of a class; 1.0 and 1 are one class."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _split_labels(value: Any) -> list[Any]:
    """Return the labels of one row: a list as it is, a cell of a table split at its separators."""
    if isinstance(value, str):
        return [part.strip() for part in _SEPARATORS.split(value) if part.strip()]
    return value if isinstance(value, list) else [value]


def _are_vectors(values: list[Any]) -> bool:
    """Return whether all are lists of 0 and 1 of one length, such as [0, 1, 1]."""
    lists = [value for value in values if isinstance(value, list)]
    lengths = {len(value) for value in lists}
    if len(lists) != len(values) or len(lengths) != 1 or min(lengths) < 2:
        return False
    return all(not isinstance(entry, str) and entry in (0, 1) for value in lists for entry in value)


def target(value: Any, kind: str, names: list[str]) -> Any:
    """Convert a label to what the loss takes: the number of its class, a 0 or 1 for each class, or a number.

    Raises:
        ValueError: it is none of the training labels, or not a number.
    """
    if kind == NUMBER:
        number = None if isinstance(value, list) else _number(value)
        if number is None:
            raise ValueError(f"label {value!r} is not a number (--problem_type {NUMBER})")
        return number
    if kind == ONE:
        return _class_index(value, names)
    labels = _split_labels(value)
    # vectors have positions instead of names; a text is a name, because classes may be called LABEL_0 as well
    has_numbers = any(not isinstance(label, str) for label in labels)
    if has_numbers and names == [_UNNAMED.format(index) for index in range(len(names))]:
        if not isinstance(value, list) or len(value) != len(names) or any(entry not in (0, 1) for entry in value):
            raise ValueError(f"label {value!r} is not a list of {len(names)} numbers 0 or 1, as the training labels are")
        return [float(entry) for entry in value]
    vector = [0.0] * len(names)
    for label in labels:
        vector[_class_index(label, names)] = 1.0
    return vector


def _class_index(value: Any, names: list[str]) -> int:
    if isinstance(value, list) or _class_name(value) not in names:
        raise ValueError(f"label {value!r} is none of the training labels ({list_names(names)})")
    return names.index(_class_name(value))


def number_labels(paths: dict[str, Path], decisive: list[str], problem_type: str) -> tuple[dict[str, str], str, list[str]]:
    """Replace the JSON text of each label in prepared files by what the loss takes.

    Args:
        paths: an Arrow file by split.
        decisive: the splits whose labels decide what the labels are.
        problem_type: the flag of this name.

    Returns:
        The new fingerprint of each file, the kind, and the names of the classes.

    Raises:
        ValueError: labels that leave their kind open, or one that training does not have; names the row.
    """
    # each distinct text is parsed once: millions of rows have a handful of labels
    texts = {name: pc.unique(read_columns(path).column("labels")).to_pylist() for name, path in paths.items()}
    values = [json.loads(text) for text in dict.fromkeys(text for name in decisive for text in texts.get(name, []))]
    kind, names = kind_and_names(values, problem_type)
    return {name: _rewrite(path, texts[name], kind, names) for name, path in paths.items()}, kind, names


def _rewrite(path: Path, texts: list[str], kind: str, names: list[str]) -> str:
    """Rewrite a file of prepared rows with targets for the texts of its labels; return its new fingerprint."""
    column = read_columns(path).column("labels")
    targets = []
    for text in texts:
        try:
            targets.append(target(json.loads(text), kind, names))
        except ValueError as error:
            row = pc.index(column, pa.scalar(text, column.type)).as_py()
            raise ValueError(f"{RowSources(path).describe([row])}: {error}. Fix or remove the row") from None
    types = {ONE: pa.int32(), SEVERAL: pa.list_(pa.float32()), NUMBER: pa.float32()}
    numbers = pa.array(targets, types[kind])
    # written under another name and renamed: another process may be reading the file
    known, scratch = pa.array(texts, column.type), path.with_suffix(".labelled")
    with ColumnWriter(scratch, piece=0) as writer:
        for batch in read_batches(path):
            index = batch.schema.get_field_index("labels")
            labels = numbers.take(pc.index_in(batch.column(index), value_set=known))
            writer.write(batch.set_column(index, "labels", labels))
    scratch.replace(path)
    return writer.fingerprint
