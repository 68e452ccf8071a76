"""What does a sample chat look like that shows which parts of a chat a template leaves out?

Each of its parts is a word that no template writes, so that the rendering shows whether the part survived.
"""

from __future__ import annotations

from typing import Any

from dsrecipes.data.turns import Turn

Shape = tuple[tuple[str, bool, bool, int], ...]
"""For each turn: its role, whether it has text, whether it has reasoning, and its number of tool calls."""
# the id has nine letters and digits, because Mistral's templates refuse any other
SAMPLE_CALL: dict[str, Any] = {
    "type": "function",
    "id": "a1b2c3d4e",
    "function": {"name": "zqfqz", "arguments": {"zqkqz": "zqvqz"}},
}
SAMPLE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "zqtoolqz",
            "description": "zqdqz",
            "parameters": {"type": "object", "properties": {"zqkqz": {"type": "string", "description": "zq"}}},
        },
    }
]


def shape_of(messages: list[Turn]) -> Shape:
    """Return the shape of a chat."""
    return tuple(
        (turn["role"], bool(turn["content"]), bool(turn.get("reasoning_content")), len(turn.get("tool_calls") or []))
        for turn in messages
    )


def sample_chat(shape: Shape) -> list[Turn]:
    """Build a chat of this shape whose parts can be recognized in a rendering."""
    turns: list[Turn] = []
    for number, (role, text, reasoning, calls) in enumerate(shape):
        turn: Turn = {"role": role, "content": f"zq{number}cqz" if text else ""}
        if reasoning:
            turn["reasoning_content"] = sample_reasoning(number)
        if calls:
            names = [f"zq{number}f{call}qz" for call in range(calls)]
            turn["tool_calls"] = [
                SAMPLE_CALL | {"function": {"name": name, "arguments": {f"{name}k": f"{name}v"}}} for name in names
            ]
        if role == "tool":
            turn |= {"tool_call_id": "a1b2c3d4e", "name": "zqfqz"}
        turns.append(turn)
    return turns


def sample_reasoning(number: int) -> str:
    """Return the reasoning of a sample's turn."""
    return f"zq{number}rqz"


def call_parts(call: dict[str, Any]) -> list[str]:
    """Return what a rendering must show of a sample's tool call."""
    name = call["function"]["name"]
    return [f"{name}k", f"{name}v"]
