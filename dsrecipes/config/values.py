"""How are flags read whose values have a syntax of their own: columns, weights of classes, durations?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from dsrecipes.errors import UserError
from dsrecipes.io.text import parse_json

_MAX_WEIGHT = 3.4028234663852886e38
"""The largest float32 number, the type of the loss; numpy would know it and takes long to import."""


def parse_columns(value: Any) -> dict[str, str]:
    """`prompt=question,output=answer` (also several such words, a mapping, or JSON) as {recipe's name: file's column}.

    Raises:
        UserError: none of these, or a name twice.
    """
    if isinstance(value, Mapping):
        pairs = [(str(name), str(column) if isinstance(column, str | int) else "") for name, column in value.items()]
    else:
        words = [value] if isinstance(value, str) else list(value or ())
        if len(words) == 1 and words[0].lstrip().startswith("{"):
            return parse_columns(parse_json(words[0], f"columns {words[0]}"))
        entries = [entry for word in words for entry in str(word).split(",") if entry.strip()]
        pairs = [(name, column) for name, _, column in (entry.partition("=") for entry in entries)]
    columns = {name.strip(): column.strip() for name, column in pairs}
    # Fewer columns than pairs: a name was given twice.
    if len(columns) < len(pairs) or not all(columns) or not all(columns.values()):
        raise UserError(
            "DSR062",
            f"columns {value}: give each of the recipe's names once with a column of the file, such as "
            "prompt=question,output=answer",
        )
    return columns


BALANCED = "balanced"
_FORMS = "numbers by class (1 5), NAME=NUMBER or INDEX=NUMBER (0=1,1=5), or balanced"


def as_weight(value: Any, name: str = "field 'weight'") -> float:
    """A weight as a number: true is 1, false is 0; None and empty text, a missing cell of a table, are 1.

    Raises:
        ValueError: not a finite number of 0 or more. A row hook calls this, and its caller adds file and row.
    """
    text = value.strip().lower() if isinstance(value, str) else value
    # Masks in published chats are true and false, and a table has empty cells.
    if text in (None, "", "true"):
        return 1.0
    try:
        weight = 0.0 if text == "false" else float(text)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight <= _MAX_WEIGHT:
        raise ValueError(f"{name} must be a weight (a number of 0 or more, true or false), found {value!r}")
    return weight


def parse_class_weights(words: list[str]) -> str | list[float] | dict[str, float]:
    """The value of --class_weights: BALANCED, weights in label order, or weights by class name or index.

    Raises:
        UserError: none of these; a weight that is negative or not finite; no weight above 0.
    """
    text = " ".join(words).strip()
    if text.lower() == BALANCED:
        return BALANCED
    pairs = _pairs(words)
    weights = [_class_weight(text, weight) for _, weight in pairs]
    names = [name for name, _ in pairs if name is not None]
    # A class that is not named weighs 1, so names with weight 0 leave something to train on.
    if not any(weights) and not names:
        raise UserError("DSR063", f"--class_weights {text}: no class would be trained on; give one a weight above 0")
    if not names:
        return weights
    if len(set(names)) < len(pairs):
        raise UserError("DSR063", f"--class_weights {text}: give each class one weight, all by name or all in order")
    return dict(zip(names, weights, strict=True))


def _pairs(words: list[str]) -> list[tuple[str | None, Any]]:
    """(class, weight) of each entry; the class is None where weights come in order."""
    text = " ".join(words).strip()
    if text[:1] in ("{", "["):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError("DSR063", f"--class_weights {text}: not JSON ({error}); give {_FORMS}") from None
        return list(value.items()) if isinstance(value, dict) else [(None, weight) for weight in value]
    parts = [part.strip() for word in words for part in word.split(",")]
    # A class name may hold spaces, so a word is split at them only where it holds several entries.
    entries = [entry for part in parts for entry in ([part] if part.count("=") == 1 else part.split())]
    triples = [entry.rpartition("=") for entry in entries]
    return [(name.strip() if equals else None, weight) for name, equals, weight in triples]


def _class_weight(text: str, value: Any) -> float:
    if value in (None, ""):
        raise UserError("DSR063", f"--class_weights {text}: give {_FORMS}")
    try:
        return as_weight(value, "a weight")
    except ValueError as error:
        raise UserError("DSR063", f"--class_weights {text}: {error}; give {_FORMS}") from None


def seconds_of(text: str) -> float:
    """A duration such as 3h50m, 90m, 45s, 1d2h, 3:50:00, or a number of seconds.

    Raises:
        UserError: not a duration, or not above 0.
    """
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    clock = re.fullmatch(r"(\d+):(\d\d):(\d\d)", text.strip())
    parts: tuple[str, ...] = ("0",) * 4
    if units:
        parts = units.groups("0")
    elif clock:
        parts = ("0", *clock.groups())
    seconds = sum(int(part) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True))
    if not seconds:
        raise UserError("DSR053", f"--time_limit {text}: give a duration such as 3h50m, 90m or 3:50:00")
    return float(seconds)
