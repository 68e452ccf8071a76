"""Formats of rows: one entry of a table is a format, and messages about wrong fields."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
from support.tiny import llama_tokenizer, write_rows

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data import formats
from dsrecipes.data.fields import text_field
from dsrecipes.data.formats import Match, RowFormat
from dsrecipes.data.load import load_splits
from dsrecipes.data.parse import instruction_record, prompt_record
from dsrecipes.data.prepare import prepare
from dsrecipes.data.renamed import renamed
from dsrecipes.data.split import Split
from dsrecipes.errors import UserError
from dsrecipes.io.console import Console


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
    records = [instruction_record({"messages": ours}), instruction_record({"conversations": theirs})]
    assert records == [{"messages": ours}] * 2


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
        instruction_record({"messages": messages})


# ---- a new format ----


def parse_riddle(row: dict[str, Any], match: Match) -> dict[str, Any]:
    """A riddle whose answers are a list."""
    return {"instruction": text_field(row, match.prompt), "input": "", "output": " or ".join(row[match.answer])}


@pytest.fixture
def riddles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One entry more in the table, and no other change."""
    entry = RowFormat(name="riddles and keys", prompt=("riddle",), answer=("keys", "answers"), parse=parse_riddle)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, entry))
    formats.matches.cache_clear()
    yield
    formats.matches.cache_clear()


def prepared(rows: list[dict[str, Any]], folder: Path, columns: dict[str, str] | None = None) -> Split:
    splits = renamed(load_splits(write_rows(folder / "rows.jsonl", rows)), columns or {})
    return prepare(
        AlpacaLlamaSft, splits, llama_tokenizer(), EncodeOptions(256, "alpaca"), validation_split=0, seed=0,
        skip_bad_rows=False, console=Console(), workers=1,
    )["train"]  # fmt: skip


def test_a_new_format_is_one_entry_of_the_table(riddles: None, tmp_path: Path) -> None:
    rows = [{"Riddle": f"What is {n}?", "keys": [str(n), f"+{n}"], "weight": 1 + n % 2, "id": 7} for n in range(9)]
    split = prepared(rows, tmp_path)
    alpaca = [{"instruction": row["Riddle"], "output": " or ".join(row["keys"]), "weight": row["weight"]} for row in rows]
    for name in ("input_ids", "labels", "weights"):
        assert split.data[name][:] == prepared(alpaca, tmp_path).data[name][:]
    assert split.stats.seen.describe() == ["riddles and keys (Riddle, keys, weight)", "unused columns: id"]
    mapped = [{"riddle": "not this", "ask": row["Riddle"], "reply": row["keys"], "weight": row["weight"]} for row in rows]
    again = prepared(mapped, tmp_path, {"riddle": "ask", "answers": "reply"})
    assert again.data["input_ids"][:] == split.data["input_ids"][:]
    assert again.stats.seen.describe()[0] == "riddles and keys (weight, riddle, answers)"


def test_prompts_messages_and_documentation_follow_from_the_table(riddles: None, tmp_path: Path) -> None:
    assert prompt_record({"riddle": "What?", "keys": ["a", "b"]}) == ({"instruction": "What?", "input": ""}, "a or b")
    assert prompt_record({"riddle": "What?", "system": "Be brief."}) == (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]},
        None,
    )
    with pytest.raises(UserError, match=r"line 1: no known format of rows.*; riddle, keys\. .*\[DSR101\]"):
        prepared([{"title": "none"}], tmp_path)
    assert ("riddles and keys", "`riddle`", "`keys`, `answers`") in formats.documented()


def test_without_the_entry_such_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DSR101"):
        prepared([{"riddle": "What?", "keys": ["a"]}], tmp_path)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"instruction": "i", "input": "c", "output": "o"}, {"instruction": "i", "input": "c"}, "o"),
        ({"question": "q", "answer": ""}, {"instruction": "q", "input": ""}, None),
        ({"prompt": [USER], "completion": [ANSWER]}, {"messages": [USER]}, "a"),
        ({"messages": [USER, ANSWER, USER]}, {"messages": [USER, ANSWER, USER]}, None),
        ({"messages": [USER, ANSWER, USER, ANSWER | {"content": "b"}]}, {"messages": [USER, ANSWER, USER]}, "b"),
        ({"conversations": json.dumps([USER]), "tools": [{"name": "f"}]},
         {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}, None),
    ],
)  # fmt: skip
def test_prompts_of_rows(row: dict[str, Any], prompt: dict[str, Any], answer: str | None) -> None:
    assert prompt_record(row) == (prompt, answer)
