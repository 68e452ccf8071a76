"""How is a chat of a file read? Turns in one form, whatever the file calls roles, texts, tool calls, reasoning and weights.

Public chat data use about a dozen dialects (OpenAI, ShareGPT, Alpaca histories, Arrow structs of lists). They differ turn by
turn, and one file may mix them, so names are looked up for each turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dsrecipes.config.values import as_weight
from dsrecipes.data.fields import EMPTY, as_json, as_text
from dsrecipes.data.tools import tool_calls

Turn = dict[str, Any]
_ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
_CONTENT_KEYS = ("content", "value", "text", "message", "utterance")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_WEIGHT_KEYS = ("weight", "loss_weight", "train", "loss")
_CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT's roles of an assistant turn whose text is the call itself, as JSON."""
ALIASES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "chatbot", "ai", *_CALL_ROLES),
    "tool": ("tool", "observation", "function", "ipython", "tool_response", "tool_result", "function_response"),
}
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in aliases}
_KNOWN_KEYS = {
    *_ROLE_KEYS,
    *_CONTENT_KEYS,
    *_REASONING_KEYS,
    *_WEIGHT_KEYS,
    "tool_calls",
    "function_call",
    "name",
    "tool_call_id",
}


def raw_turns(value: Any, name: str) -> list[Any]:
    """Return a chat as a list of items.

    JSON text, Arrow's struct of lists {"role": [...], ...} and [role, text] pairs are accepted too.

    Raises:
        ValueError: none of these; names the column.
    """
    value = as_json(value, f"{name}: the chat") if value != "" else []
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) > 1:
            raise ValueError(f"{name}: lists of different lengths ({', '.join(f'{k} {len(v)}' for k, v in value.items())})")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        description = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"field {name!r} must be a list of turns (objects with role and content), found {description}")
    if isinstance(value[0], (list, tuple)) and all(map(_is_role_and_text, value)):
        return [{"role": role, "content": text} for role, text in value]
    return value


def chat_turns(value: Any, name: str, unused: set[str] | None = None) -> list[Turn]:
    """Return turns as {"role": system|user|assistant|tool, "content": text} with their optional parts.

    Optional are `reasoning_content`, `tool_calls` (in OpenAI's form, arguments as a dict), `name`, `tool_call_id`, and a
    `weight` other than 1.

    Args:
        value: turns, or [question, answer] pairs.
        name: of the column, for messages.
        unused: collects `NAME.KEY` of keys that hold something and are not used.

    Raises:
        ValueError: not a list of turns, an unknown role, no text; names the turn.
    """
    result: list[Turn] = []
    for number, item in enumerate(raw_turns(value, name), 1):
        try:
            turn = _plain_turn(item) if type(item) is dict and len(item) == 2 else None
            if turn:
                result.append(turn)
                continue
            for raw in _split(item):
                result.append(_turn(raw))
                if unused is not None and len(raw) > 2:
                    unused |= {f"{name}.{key}" for key in raw if key not in _KNOWN_KEYS and raw[key] not in EMPTY}
        except ValueError as error:
            raise ValueError(f"{name}: turn {number} {error}") from None
    return result


def check_answers(turns: list[Turn], name: str) -> list[Turn]:
    """Return the turns unchanged.

    Raises:
        ValueError: there is no assistant turn.
    """
    if not any(turn["role"] == "assistant" for turn in turns):
        roles = ", ".join(turn["role"] for turn in turns[:8])
        raise ValueError(f"{name}: expected at least one answer (a turn of role assistant), found {roles}")
    return turns


def _plain_turn(item: dict[str, Any]) -> Turn | None:
    """Read a turn of the two keys that nearly all files use, four times as fast as _turn; None for any other turn."""
    # this runs for nearly every turn of nearly every chat; whatever is unusual is left to _turn, which has the messages
    content = item.get("content")
    role, text = (item.get("role"), content) if content is not None else (item.get("from"), item.get("value"))
    if type(role) is not str or type(text) is not str or role in _CALL_ROLES or not text.strip():
        return None
    if not text.isascii():
        as_text(text, f"({role}): its text")
    known = ROLES.get(role)
    return {"role": known, "content": text} if known else None


def is_turn(item: dict[str, Any]) -> bool:
    """Return whether an object looks like a turn of a chat."""
    return any(key in item for key in _ROLE_KEYS) or any(str(key).lower() in ROLES for key in item)


def _split(item: Any) -> Iterator[dict[str, Any]]:
    """Yield a turn, or the turns of a [question, answer] pair or of {"human": question, "assistant": answer}."""
    if isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item):
        yield {"role": "user", "content": item[0]}
        yield {"role": "assistant", "content": item[1]}
        return
    if not isinstance(item, dict):
        raise ValueError(f"must be an object with role and content, found {type(item).__name__}")
    # Arrow fills the keys that an object does not have with null
    filled = {key: text for key, text in item.items() if text is not None}
    if any(key in filled for key in _ROLE_KEYS) or not filled or any(str(key).lower() not in ROLES for key in filled):
        yield item
        return
    yield from ({"role": key, "content": text} for key, text in filled.items())


def _is_role_and_text(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and str(item[0]).strip().lower() in ROLES


def _first(turn: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """Return the first of the keys that has a value, and the value; the first key where none has."""
    return next(((key, turn[key]) for key in keys if turn.get(key) is not None), (keys[0], None))


def _turn(raw: dict[str, Any]) -> Turn:
    """Read a turn with any keys."""
    _, role = _first(raw, _ROLE_KEYS)
    alias = role.strip().lower() if isinstance(role, str) else role
    if role is None:
        raise ValueError(f"has no role: expected role and content, found {', '.join(map(str, raw)) or 'no keys'}")
    if not isinstance(alias, str) or alias not in ROLES:
        raise ValueError(f"has role {role!r}; known: {', '.join(ROLES)}")
    turn: Turn = {"role": ROLES[alias], "content": ""}
    key, content = _first(raw, _CONTENT_KEYS)
    if alias in _CALL_ROLES and content not in EMPTY:
        turn["tool_calls"] = tool_calls(content)
        content = ""
    if len(raw) > (1 if content is None else 2):
        _add_extras(turn, raw)
    has_other_content = "tool_calls" in turn or "reasoning_content" in turn
    if content is None:
        if not has_other_content:
            raise ValueError(f"({alias}): field {key!r} is missing (the turn has: {', '.join(map(str, raw))})")
        content = ""
    turn["content"] = _content(content, key, turn["role"])
    if turn["role"] == "assistant" and not (turn["content"].strip() or has_other_content):
        raise ValueError("(assistant) is empty: expected text or tool_calls")
    return turn


def _content(content: Any, key: str, role: str) -> str:
    """Read text, or join parts of type text; the result of a tool may be any JSON."""
    name = f"({role}): field {key!r}"
    if isinstance(content, str):
        return as_text(content, name)
    parts = [content] if isinstance(content, dict) else content
    if isinstance(parts, list) and all(map(_is_part, parts)):
        return "".join(_part_text(part, key, role) for part in parts)
    if role == "tool" and isinstance(content, (dict, list)):
        try:
            content = json.dumps(content, ensure_ascii=False)
        except RecursionError:
            raise ValueError(f"{name} is nested too deeply") from None
    return as_text(content, name)


def _is_part(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, dict) and "type" in item)


def _part_text(part: str | dict[str, Any], key: str, role: str) -> str:
    if isinstance(part, dict):
        if part["type"] not in ("text", "input_text", "output_text") or "text" not in part:
            raise ValueError(
                f"({role}): a part of its {key} is of type {part['type']!r}; only parts of type text can be used"
            )
        part = part["text"]
    return as_text(part, f"({role}): the text of a part")


def _add_extras(turn: Turn, raw: dict[str, Any]) -> None:
    """Add what a turn has besides role and content."""
    role = turn["role"]
    if role == "assistant":
        if raw.get("tool_calls") not in EMPTY:
            turn["tool_calls"] = tool_calls(raw["tool_calls"])
        elif raw.get("function_call") not in EMPTY:
            turn["tool_calls"] = tool_calls(raw["function_call"])
        key, reasoning = _first(raw, _REASONING_KEYS)
        if reasoning not in EMPTY:
            turn["reasoning_content"] = as_text(reasoning, f"({role}): field {key!r}")
        # weights of other turns are ignored, because they are never trained on
        key, given = _first(raw, _WEIGHT_KEYS)
        weight = as_weight(given, f"({role}): field {key!r}") if given is not None else 1.0
        if weight != 1:
            turn["weight"] = weight
    for key in ("name", "tool_call_id"):
        if raw.get(key) not in EMPTY:
            turn[key] = as_text(raw[key], f"({role}): field {key!r}")
