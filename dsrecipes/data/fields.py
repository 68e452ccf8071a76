"""How is a field of a row read as text or JSON, and what does a message say of a field of the wrong type?"""

from __future__ import annotations

import json
import math
from typing import Any

from dsrecipes.data.row import Row

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of a field without content; 0 and false are content."""


def as_text(value: Any, name: str) -> str:
    """Return text as it is, and numbers, true and false as JSON writes them.

    Args:
        value: of the field.
        name: of the field, for messages.

    Raises:
        ValueError: another type, or text that cannot be encoded.
    """
    if not isinstance(value, str):
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return str(value)
        raise ValueError(f"{name} must be text, found {value if isinstance(value, float) else type(value).__name__}")
    # isascii is nearly free, and most texts need no further check
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} holds half of a surrogate pair ({value[error.start]}, character {error.start + 1}): a character "
                "was cut in two when the text was shortened; remove the half"
            ) from None
    return value


def as_json(value: Any, name: str) -> Any:
    """Decode a value that tables hold as JSON text; other values stay.

    Raises:
        ValueError: text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is text, but not JSON ({error})") from None


def text_field(row: Row, name: str, default: str | None = None) -> str:
    """Return a field as text; numbers become text.

    Args:
        row: of a file.
        name: of the field.
        default: for a field that is missing or null.

    Raises:
        ValueError: the field is missing and has no default, or is not text.
    """
    value = row.get(name, default)
    if value is None or (isinstance(value, float) and value != value):  # pandas writes NaN for a missing value
        value = default
    if value is None:
        raise ValueError(f"field {name!r} is missing (the row has: {list_columns(row)})")
    return as_text(value, f"field {name!r}")


def list_columns(row: Row) -> str:
    """Return the names of a row's columns for a message, without counting them as used."""
    return ", ".join(map(str, dict.keys(row))) or "nothing"
