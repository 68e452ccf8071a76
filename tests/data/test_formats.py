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


def test_messages_in_both_dialects():
    ours = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    theirs = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert messages_field({"messages": ours}) == ours == messages_field({"conversations": theirs}, "conversations")


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "must be a list"),
        ([], "must be a list"),
        (["hello"], "turn 1 must be an object"),
        ([USER, {"role": "tool", "content": "x"}], "turn 2 has role 'tool'; known: system, user"),
        ([{"role": "user"}], "'value' is missing"),
        ([{"role": "user", "content": 3}, ANSWER], "must be text, found int"),
        ([USER], "at least one answer"),
        ([ANSWER, USER], "user, assistant, user"),
        ([USER, USER, ANSWER], "user, assistant, user"),
        ([USER, {"role": "assistant", "content": "  "}], "an assistant turn is empty"),
        ([{"role": ["user"], "content": "q"}, ANSWER], "turn 1 has role"),
    ],
)
def test_a_wrong_chat_says_which_turn(messages, problem):
    with pytest.raises(ValueError, match=problem):
        messages_field({"messages": messages})
