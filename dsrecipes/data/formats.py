"""Checks that format_row shares: a row's fields as plain Python, or ValueError saying which field is wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from dsrecipes.data.files import Row

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def text_field(row: Row, name: str, default: str | None = None) -> str:
    """The field as text.

    Raises:
        ValueError: missing and without a default, or not text.
    """
    value = row.get(name, default)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"field {name!r} is missing (the row has: {', '.join(map(str, row)) or 'nothing'})")
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, found {type(value).__name__}")
    return value


def messages_field(row: Row, name: str = "messages") -> list[dict[str, str]]:
    """A chat as [{"role": system|user|assistant, "content": text}, ...].

    ShareGPT's from/value keys and human/gpt roles are understood too.

    Raises:
        ValueError: not a list of turns, an unknown role, no text, or a turn order that has nothing to learn.
    """
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"field {name!r} must be a list of turns")
    result = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"{name}: turn {number} must be an object with role and content")
        role: Any = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"{name}: turn {number} has role {role!r}; known: {', '.join(_ROLES)}")
        content = text_field(turn, "content" if "content" in turn else "value")
        result.append({"role": _ROLES[role], "content": content})
    spoken = [turn["role"] for turn in result if turn["role"] != "system"]
    if spoken[:1] != ["user"] or any(a == b for a, b in pairwise(spoken)) or "assistant" not in spoken:
        raise ValueError(f"{name}: turns must go user, assistant, user, ... with at least one answer")
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in result):
        raise ValueError(f"{name}: an assistant turn is empty")
    return result
