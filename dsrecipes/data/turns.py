"""The turns of a chat in one form, whatever names a file has for roles, texts, tool calls, reasoning and weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from dsrecipes.config.values import as_weight

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
    *_ROLE_KEYS, *_CONTENT_KEYS, *_REASONING_KEYS, *_WEIGHT_KEYS, "tool_calls", "function_call", "name", "tool_call_id",
}  # fmt: skip
EMPTY: tuple[Any, ...] = (None, "", [], {})


def as_text(value: Any, what: str) -> str:
    """Text as it is, numbers and true/false as JSON writes them.

    Raises:
        ValueError: another type, or text that no encoding has.
    """
    if not isinstance(value, str):
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return str(value)
        raise ValueError(f"{what} must be text, found {value if isinstance(value, float) else type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} holds half of a surrogate pair ({value[error.start]}, character {error.start + 1}): a character "
                "was cut in two when the text was shortened; remove the half"
            ) from None
    return value


def parsed(value: Any, what: str) -> Any:
    """The value of a field that tables hold as JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is text, but not JSON ({error})") from None


def raw_turns(value: Any, name: str) -> list[Any]:
    """A chat as a list: also from JSON text, from Arrow's struct of lists {"role": [...], ...}, and from [role, text] pairs."""
    value = parsed(value, f"{name}: the chat") if value != "" else []
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) > 1:
            raise ValueError(f"{name}: lists of different lengths ({', '.join(f'{k} {len(v)}' for k, v in value.items())})")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"field {name!r} must be a list of turns (objects with role and content), found {found}")
    if isinstance(value[0], (list, tuple)) and all(map(_is_role_and_text, value)):
        return [{"role": role, "content": text} for role, text in value]
    return value


def chat_turns(value: Any, name: str, unused: set[str] | None = None) -> list[Turn]:
    """Turns as {"role": system|user|assistant|tool, "content": text}, with what else a turn has.

    That is `reasoning_content`, `tool_calls` (OpenAI's form, arguments as a dict), `name`, `tool_call_id`, and a `weight`
    other than 1.

    Args:
        value: turns, or [question, answer] pairs.
        name: the column, for messages.
        unused: gets `NAME.KEY` of keys that hold something and mean nothing here.

    Raises:
        ValueError: not a list of turns, an unknown role, no text; names the turn.
    """
    result: list[Turn] = []
    for number, item in enumerate(raw_turns(value, name), 1):
        try:
            if type(item) is dict and len(item) == 2 and (turn := _plain_turn(item)):
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
    """The turns as they are.

    Raises:
        ValueError: no assistant turn.
    """
    if not any(turn["role"] == "assistant" for turn in turns):
        roles = ", ".join(turn["role"] for turn in turns[:8])
        raise ValueError(f"{name}: expected at least one answer (a turn of role assistant), found {roles}")
    return turns


def _plain_turn(item: dict[str, Any]) -> Turn | None:
    """The turn in the two keys that nearly all files use, which takes a quarter of _turn's time; None for any other."""
    content = item.get("content")
    role, text = (item.get("role"), content) if content is not None else (item.get("from"), item.get("value"))
    if type(role) is not str or type(text) is not str or role in _CALL_ROLES or not text.strip():
        return None
    if not text.isascii():
        as_text(text, f"({role}): its text")
    known = ROLES.get(role)
    return {"role": known, "content": text} if known else None


def is_turn(item: dict[str, Any]) -> bool:
    """Whether an object looks like a turn of a chat."""
    return any(key in item for key in _ROLE_KEYS) or any(str(key).lower() in ROLES for key in item)


def _split(item: Any) -> Iterator[dict[str, Any]]:
    """A turn; or the turns of a [question, answer] pair or of {"human": question, "assistant": answer}."""
    if isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item):
        yield {"role": "user", "content": item[0]}
        yield {"role": "assistant", "content": item[1]}
        return
    if not isinstance(item, dict):
        raise ValueError(f"must be an object with role and content, found {type(item).__name__}")
    filled = {key: text for key, text in item.items() if text is not None}
    if any(key in filled for key in _ROLE_KEYS) or not filled or any(str(key).lower() not in ROLES for key in filled):
        yield item
        return
    yield from ({"role": key, "content": text} for key, text in filled.items())


def _is_role_and_text(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and str(item[0]).strip().lower() in ROLES


def _first(turn: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The first of the keys that has a value, and the value; the first key where none has."""
    return next(((key, turn[key]) for key in keys if turn.get(key) is not None), (keys[0], None))


def _turn(raw: dict[str, Any]) -> Turn:
    _, word = _first(raw, _ROLE_KEYS)
    alias = word.strip().lower() if isinstance(word, str) else word
    if word is None:
        raise ValueError(f"has no role: expected role and content, found {', '.join(map(str, raw)) or 'no keys'}")
    if not isinstance(alias, str) or alias not in ROLES:
        raise ValueError(f"has role {word!r}; known: {', '.join(ROLES)}")
    turn: Turn = {"role": ROLES[alias], "content": ""}
    key, content = _first(raw, _CONTENT_KEYS)
    if alias in _CALL_ROLES and content not in EMPTY:
        turn["tool_calls"] = _tool_calls(content)
        content = ""
    if len(raw) > (1 if content is None else 2):
        _add_extras(turn, raw)
    if content is None:
        if not ("tool_calls" in turn or "reasoning_content" in turn):
            raise ValueError(f"({alias}): field {key!r} is missing (the turn has: {', '.join(map(str, raw))})")
        content = ""
    turn["content"] = _content(content, key, turn["role"])
    if turn["role"] == "assistant" and not (turn["content"].strip() or "tool_calls" in turn or "reasoning_content" in turn):
        raise ValueError("(assistant) is empty: expected text or tool_calls")
    return turn


def _content(content: Any, key: str, role: str) -> str:
    """Text, or parts of type text joined; what a tool returned may be any JSON."""
    if isinstance(content, str):
        return as_text(content, f"({role}): field {key!r}")
    parts = [content] if isinstance(content, dict) else content
    is_parts = isinstance(parts, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in parts
    )
    if not is_parts:
        if role == "tool" and isinstance(content, (dict, list)):
            try:
                text = json.dumps(content, ensure_ascii=False)
            except RecursionError:
                raise ValueError(f"({role}): field {key!r} is nested too deeply") from None
            return as_text(text, f"({role}): field {key!r}")
        return as_text(content, f"({role}): field {key!r}")
    texts = []
    for part in parts:
        if isinstance(part, dict) and not (part["type"] in ("text", "input_text", "output_text") and "text" in part):
            raise ValueError(
                f"({role}): a part of its {key} is of type {part['type']!r}; only parts of type text can be used"
            )
        texts.append(as_text(part if isinstance(part, str) else part["text"], f"({role}): the text of a part"))
    return "".join(texts)


def _add_extras(turn: Turn, raw: dict[str, Any]) -> None:
    if turn["role"] == "assistant":
        if raw.get("tool_calls") not in EMPTY:
            turn["tool_calls"] = _tool_calls(raw["tool_calls"])
        elif raw.get("function_call") not in EMPTY:
            turn["tool_calls"] = _tool_calls(raw["function_call"])
        key, reasoning = _first(raw, _REASONING_KEYS)
        if reasoning not in EMPTY:
            turn["reasoning_content"] = as_text(reasoning, f"({turn['role']}): field {key!r}")
        key, weight = _first(raw, _WEIGHT_KEYS)
        if weight is not None and (value := as_weight(weight, f"({turn['role']}): field {key!r}")) != 1:
            turn["weight"] = value
    for key in ("name", "tool_call_id"):
        if raw.get(key) not in EMPTY:
            turn[key] = as_text(raw[key], f"({turn['role']}): field {key!r}")


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Calls in OpenAI's form; a bare {"name", "arguments"} too."""
    calls = parsed(value, "has tool calls: the field")
    result = []
    for number, call in enumerate([calls] if isinstance(calls, dict) else calls if isinstance(calls, list) else [calls], 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'has a tool call without a name (call {number}): expected {{"function": {{"name", "arguments"}}}}'
            )
        arguments = function.get("arguments", function.get("parameters"))
        arguments = parsed(arguments, f"has a tool call (call {number}) whose field 'arguments'") if arguments != "" else {}
        if not isinstance(arguments, dict | None):
            raise ValueError(
                f"has a tool call (call {number}) whose arguments are {type(arguments).__name__}; expected an object"
            )
        identity = {"id": call["id"]} if call.get("id") not in EMPTY else {}
        result.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
    return result


def tool_schemas(value: Any, name: str) -> list[dict[str, Any]]:
    """The tools that a row offers, as the JSON schemas that templates take; JSON text and bare functions too.

    Raises:
        ValueError: not a list of objects.
    """
    tools = parsed(value, f"field {name!r}") if value not in EMPTY else None
    if tools in EMPTY:
        return []
    result = []
    for number, item in enumerate([tools] if isinstance(tools, dict) else tools if isinstance(tools, list) else [tools], 1):
        tool = parsed(item, f"field {name!r}: tool {number}")
        if not isinstance(tool, dict):
            raise ValueError(f"field {name!r}: tool {number} must be an object (a JSON schema), found {type(tool).__name__}")
        # servers send OpenAI's form, so that is what a template meets later
        result.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return result
