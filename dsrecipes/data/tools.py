"""How are the tool calls and the tool definitions of a row read? In OpenAI's form, which chat templates expect."""

from __future__ import annotations

from typing import Any

from dsrecipes.data.fields import EMPTY, as_json


def tool_calls(value: Any) -> list[dict[str, Any]]:
    """Return the tool calls of a turn in OpenAI's form; a bare {"name", "arguments"} is accepted too.

    Raises:
        ValueError: a call without a name, or whose arguments are no object.
    """
    calls = as_json(value, "has tool calls: the field")
    result = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls], 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'has a tool call without a name (call {number}): expected {{"function": {{"name", "arguments"}}}}'
            )
        # Llama 3 calls them `parameters`
        arguments = function.get("arguments", function.get("parameters"))
        arguments = as_json(arguments, f"has a tool call (call {number}) whose field 'arguments'") if arguments != "" else {}
        if not isinstance(arguments, dict | None):
            raise ValueError(
                f"has a tool call (call {number}) whose arguments are {type(arguments).__name__}; expected an object"
            )
        # an empty id is left out, because a template may print it
        identity = {"id": call["id"]} if call.get("id") not in EMPTY else {}
        result.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
    return result


def tool_schemas(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the tools that a row offers, as the JSON schemas that templates expect; also from JSON text and bare functions.

    Args:
        value: of the column.
        name: of the column, for messages.

    Raises:
        ValueError: not a list of objects.
    """
    tools = as_json(value, f"field {name!r}") if value not in EMPTY else None
    if tools in EMPTY:
        return []
    result = []
    for number, item in enumerate(tools if isinstance(tools, list) else [tools], 1):
        tool = as_json(item, f"field {name!r}: tool {number}")
        if not isinstance(tool, dict):
            raise ValueError(f"field {name!r}: tool {number} must be an object (a JSON schema), found {type(tool).__name__}")
        is_bare = "name" in tool and "function" not in tool
        # servers send OpenAI's form, so the model must be trained on it
        result.append({"type": "function", "function": tool} if is_bare else tool)
    return result
