"""What format_row's checks take and what they say of a wrong field."""

import pytest

from dsrecipes.data.formats import messages_field, text_field


def test_text_field():
    assert text_field({"a": "x"}, "a") == "x" and text_field({}, "a", "") == "" == text_field({"a": None}, "a", "")
    with pytest.raises(ValueError, match=r"field 'a' is missing \(the row has: b, c\)"):
        text_field({"b": 1, "c": 2}, "a")
    with pytest.raises(ValueError, match="the row has: nothing"):
        text_field({}, "a")
    with pytest.raises(ValueError, match="field 'a' must be text, found list"):
        text_field({"a": ["x"]}, "a")
    assert [text_field({"a": value}, "a") for value in (4, 2.5, True)] == ["4", "2.5", "true"]
    assert text_field({"a": float("nan")}, "a", "") == ""


def test_messages_in_both_dialects():
    ours = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    theirs = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert messages_field({"messages": ours}) == ours == messages_field({"conversations": theirs}, "conversations")


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "is text, but not JSON"),
        (3, "must be a list"),
        ([], "must be a list"),
        (["hello"], "turn 1 must be an object"),
        ([USER, {"role": "judge", "content": "x"}], "turn 2 has role 'judge'; known: system, developer, user"),
        ([USER, {"content": "x"}], "turn 2 has no role"),
        ([{"role": "user"}], r"turn 1 \(user\): field 'content' is missing"),
        ([{"role": "user", "content": {"a": 1}}, ANSWER], r"turn 1 \(user\): field 'content' must be text, found dict"),
        ([USER], "at least one answer"),
        ([USER, {"role": "assistant", "content": "  "}], r"turn 2 \(assistant\) is empty: expected text or tool_calls"),
        ([USER, ANSWER | {"weight": -1}], r"turn 2 \(assistant\): field 'weight' must be a weight .* found -1"),
        ([USER, ANSWER | {"tool_calls": [{"function": {}}]}], "turn 2 has a tool call without a name"),
        (
            [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}],
            "turn 2 has a tool call .*'arguments' is text, but not",
        ),
        (
            [USER, ANSWER | {"content": [{"type": "image_url", "image_url": {}}]}],
            "turn 2 .* of type 'image_url'; only parts of type text",
        ),
        ([ANSWER | {"content": "a\ud83d"}], r"turn 1 \(assistant\): .* half of a surrogate pair"),
        ({"role": ["user"], "content": ["a", "b"]}, "lists of different lengths"),
        ("[1", "is text, but not JSON"),
        ([{"role": ["user"], "content": "q"}, ANSWER], "turn 1 has role"),
    ],
)
def test_a_wrong_chat_says_which_turn(messages, problem):
    with pytest.raises(ValueError, match=problem):
        messages_field({"messages": messages})
