"""The forms of rows that people have, in one table, and each row as the record that the recipes train on.

Adding a form is a line of FORMS. Checks raise ValueError, which says what is wrong with the field.
"""

from __future__ import annotations

import re
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dsrecipes.config.values import as_weight
from dsrecipes.data.files import Row
from dsrecipes.data.seen import ReadRow, name_form
from dsrecipes.data.turns import EMPTY, Turn, as_text, chat_turns, check_answers, raw_turns, tool_schemas


@dataclass(frozen=True)
class Form:
    """A form of rows: the names that its columns have, in lower case, the preferred one first."""

    name: str
    question: tuple[str, ...]
    answer: tuple[str, ...] = ()
    """Empty for a form whose one column holds everything."""


_ANSWERS = ("output", "completion", "response", "answer", "solution", "target", "targets")
CHAT = Form("chats", ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns"))
TEXT = Form("texts", ("text", "content", "contents", "document", "raw_content", "page_content", "passage", "article", "story", "body", "code"))  # fmt: skip
FORMS = (
    CHAT,
    Form("Alpaca rows", ("instruction",), ("output", *_ANSWERS)),
    Form("prompts and completions", ("prompt",), ("completion", *_ANSWERS)),
    Form("queries and responses", ("query",), ("response", *_ANSWERS)),
    Form("questions and answers", ("question",), ("answer", *_ANSWERS)),
    Form("problems and solutions", ("problem",), ("solution", *_ANSWERS)),
)
"""Forms of rows for recipes that train on answers, in the order in which they are looked for."""
_INPUTS = Form("inputs and outputs", ("input", "inputs"), ("output", *_ANSWERS))
"""Only where no form of FORMS fits: beside an instruction, `input` is its context."""
_BESIDE = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "weight": ("weight",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
_NO_INPUT = re.compile(r"\s*|\W*no ?input\W*|<?NA>?|N/A|nan|null|none", flags=re.IGNORECASE)
"""What rows write for an input that is not there: nothing, noinput, <noinput>, and pandas' or R's nan, None, NA, <NA>."""


@dataclass(frozen=True)
class _Choice:
    """A form that a row's columns allow, with the names that its columns have in this row."""

    form: Form
    question: str
    answer: str | None


@dataclass(frozen=True)
class _Plan:
    """What the columns of a row allow; the values decide between the choices."""

    choices: tuple[_Choice, ...]
    beside: dict[str, str]
    """Part of _BESIDE -> the column that holds it."""


@lru_cache(maxsize=4096)
def _plan(columns: tuple[Any, ...], mapped: tuple[str, ...]) -> _Plan:
    """The plan for these columns; what --columns maps comes before what a column is called."""
    names = {str(column).strip().lower(): column for column in reversed(columns)}

    def find(aliases: tuple[str, ...]) -> Any:
        present = [names[alias] for alias in aliases if alias in names]
        return next((column for column in present if column in mapped), present[0] if present else None)

    choices = [
        _Choice(form, names[question], find(form.answer))
        for form in FORMS
        for question in form.question
        if question in names
    ]
    if not choices:
        choices = [_Choice(_INPUTS, names[name], find(_INPUTS.answer)) for name in _INPUTS.question if name in names]
    # the columns that the user maps are those to train on, whatever else the row has
    most = max((_count_mapped(choice, mapped) for choice in choices), default=0)
    choices = [choice for choice in choices if _count_mapped(choice, mapped) == most]
    beside = {part: column for part, aliases in _BESIDE.items() if (column := find(aliases)) is not None}
    return _Plan(tuple(choices), beside)


def _count_mapped(choice: _Choice, mapped: tuple[str, ...]) -> int:
    return len({choice.question, choice.answer} & set(mapped))


def _plan_of(row: Row) -> _Plan:
    return _plan(tuple(dict.keys(row)), getattr(row, "mapped", ()))


def _choose(row: Row, choices: tuple[_Choice, ...]) -> _Choice | None:
    """The first choice whose columns hold something: in files of several forms the other forms' columns are empty."""
    if len(choices) < 2:
        return choices[0] if choices else None
    asked = [choice for choice in choices if dict.get(row, choice.question) not in EMPTY]
    answered = [choice for choice in asked if choice.answer is None or dict.get(row, choice.answer) not in EMPTY]
    return (answered or asked or list(choices))[0]


def instruction_record(row: Row) -> dict[str, Any]:
    """A row of any of FORMS as {"instruction", "input", "output"}, or as {"messages": turns} and perhaps `tools`.

    Messages are what a chat becomes, and an instruction beside which the row has a system prompt, earlier turns or tools.
    A `weight` column that is not 1 becomes the record's.

    Raises:
        ValueError: a row of no known form, a field that is missing or of the wrong type; a turn at fault by its number.
    """
    plan = _plan_of(row)
    choice = _choose(row, plan.choices)
    if choice is None:
        raise ValueError(_no_form(row))
    turns, record = (_chat(row, choice), {}) if choice.form is CHAT else _pair(row, plan, choice)
    beside = plan.beside
    system = _optional(row, beside["system"]) if "system" in beside else ""
    history = _history(row, beside["history"]) if "history" in beside else []
    tools = tool_schemas(row.get(beside["tools"]), beside["tools"]) if "tools" in beside else []
    if system or history or tools or choice.form is CHAT or turns:
        turns = turns or as_turns(record)
        repeated = turns[0] == {"role": "system", "content": system}
        opening: list[Turn] = [{"role": "system", "content": system}] if system and not repeated else []
        record = {"messages": check_answers([*opening, *history, *turns], choice.question)}
        if tools:
            record["tools"] = tools
    if "weight" in beside and (weight := row.get(beside["weight"])) not in EMPTY:
        value = as_weight(weight, f"field {beside['weight']!r}")
        if value != 1:
            record["weight"] = value
    name_form(row, choice.form.name)
    return record


def _chat(row: Row, choice: _Choice) -> list[Turn]:
    unused: set[str] = set()
    turns = chat_turns(row.get(choice.question), choice.question, unused)
    if unused and type(row) is ReadRow:
        row.unused = unused
    return turns


def _pair(row: Row, plan: _Plan, choice: _Choice) -> tuple[list[Turn], dict[str, Any]]:
    """The turns of a pair of which one side is a list of turns, as in TRL; else no turns, and a record of texts."""
    question = row.get(choice.question)
    answer = row.get(choice.answer) if choice.answer is not None else None
    if answer is None:
        raise ValueError(_no_answer(row, plan, choice))
    if _holds_turns(question) or _holds_turns(answer):
        return _turns_of_pair(question, answer, choice), {}
    record = {"instruction": text_field(row, choice.question), "output": text_field(row, choice.answer or "")}
    context = plan.beside.get("input")
    record["input"] = _optional(row, context) if context not in (None, choice.question) else ""
    if not record["instruction"].strip() and not record["input"].strip():
        raise ValueError(f"field {choice.question!r} is empty")
    if not record["output"].strip():
        raise ValueError(f"field {choice.answer!r} is empty")
    return [], record


def _holds_turns(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(column, list) for column in value.values())
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _turns_of_pair(question: Any, answer: Any, choice: _Choice) -> list[Turn]:
    if _holds_turns(question):
        asked = chat_turns(question, choice.question)
        for turn in asked:  # TRL trains on the completion alone
            if turn["role"] == "assistant":
                turn["weight"] = 0.0
    else:
        asked = [{"role": "user", "content": as_text(question, f"field {choice.question!r}")}]
    if _holds_turns(answer):
        return asked + check_answers(chat_turns(answer, str(choice.answer)), str(choice.answer))
    return [*asked, {"role": "assistant", "content": as_text(answer, f"field {choice.answer!r}")}]


def as_turns(record: dict[str, Any]) -> list[Turn]:
    """A record of an instruction as a chat of two turns."""
    question = "\n\n".join(filter(None, (record["instruction"], record["input"])))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _optional(row: Row, column: Any) -> str:
    """The text of a column that may hold nothing, or a word for nothing."""
    text = text_field(row, column, "")
    return "" if _NO_INPUT.fullmatch(text) else text


def _history(row: Row, column: Any) -> list[Turn]:
    """Earlier turns: [question, answer] pairs, or turns."""
    value = row.get(column)
    if value in EMPTY or (isinstance(value, str) and _NO_INPUT.fullmatch(value)):
        return []
    if isinstance(value, str) and value.strip() == "[]":
        return []
    return chat_turns(value, str(column))


def _no_answer(row: Row, plan: _Plan, choice: _Choice) -> str:
    if "chosen" in plan.beside:
        pair = row.get(plan.beside["chosen"])
        target = "messages" if isinstance(pair, list) else choice.form.answer[0]
        return (
            "a preference row (chosen, rejected), and this recipe trains on one answer: --columns "
            f"{target}={plan.beside['chosen']} trains on the chosen one"
        )
    return f"field {choice.answer or choice.form.answer[0]!r} is missing (the row has: {_columns(row)})"


def _no_form(row: Row) -> str:
    names = {str(column).strip().lower(): column for column in dict.keys(row)}
    if "chosen" in names and "rejected" in names:
        return (
            "a preference row (chosen, rejected), and this recipe trains on one answer: where `chosen` is a list of turns, "
            f"--columns messages={names['chosen']} trains on it"
        )
    if {"role", "from"} & names.keys() and {"content", "value"} & names.keys():
        return 'a single turn, where a row must be a whole chat: [{"role": "user", ...}, {"role": "assistant", ...}]'
    known = "; ".join(f"{form.question[0]}, {form.answer[0]}" if form.answer else form.question[0] for form in FORMS)
    text = next((names[name] for name in TEXT.question if name in names), None)
    plain = f". For plain text (field {text!r}) use the recipe gpt2_clm" if text is not None else ""
    return (
        f"no known form of rows: the row has {_columns(row)}; expected one of: {known}{plain}. Other names are mapped with "
        "--columns instruction=COLUMN,output=COLUMN"
    )


def _columns(row: Row) -> str:
    return ", ".join(map(str, dict.keys(row))) or "nothing"


def text_record(row: Row) -> dict[str, Any]:
    """A row of plain text as {"text", "end"}; `end` false marks a piece of a longer document.

    Raises:
        ValueError: no column of text.
    """
    plan = _text_plan(tuple(dict.keys(row)), getattr(row, "mapped", ()))
    column = next((name for name in plan if dict.get(row, name) is not None), plan[0] if plan else None)
    if column is None:
        choice = _choose(row, _plan_of(row).choices)
        if choice is not None:
            raise ValueError(
                f"this row is of the form {choice.form.name!r} ({_columns(row)}), where a text was expected: the recipe "
                "alpaca_llama_sft trains on such rows; --columns text=COLUMN takes one column as plain text"
            )
        raise ValueError(
            f"field 'text' is missing (the row has: {_columns(row)}); --columns text=COLUMN takes another column"
        )
    record = {"text": text_field(row, column), "end": row.get("end", True)}
    name_form(row, TEXT.name)
    return record


@lru_cache(maxsize=4096)
def _text_plan(columns: tuple[Any, ...], mapped: tuple[str, ...]) -> list[Any]:
    names = {str(column).strip().lower(): column for column in reversed(columns)}
    present = [names[alias] for alias in TEXT.question if alias in names]
    return sorted(present, key=lambda column: column not in mapped)


def with_answer(row: Row, answer: str, reasoning: str = "") -> tuple[Row, bool]:
    """The row with `answer` where it has none, and whether it had one; a row of no known form as it is.

    Args:
        reasoning: that of the answer, for a chat whose prompt may open a block for it.
    """
    choice = _choose(row, _plan_of(row).choices)
    if choice is None:
        return row, True
    if choice.form is CHAT:
        turns = raw_turns(row.get(choice.question), choice.question)
        parsed = chat_turns(turns, choice.question)
        if parsed[-1]["role"] == "assistant":
            return row, True
        turn = {"role": "assistant", "content": answer} | ({"reasoning_content": reasoning} if reasoning else {})
        return _changed(row, choice.question, [*turns, turn]), False
    column = choice.answer if choice.answer is not None else choice.form.answer[0]
    value = row.get(column)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return _changed(row, column, answer), False
    return row, True


def _changed(row: Row, column: str, value: Any) -> Row:
    changed = copy(row)
    changed[column] = value
    return changed


def text_field(row: Row, name: str, default: str | None = None) -> str:
    """The field as text; numbers become text.

    Raises:
        ValueError: missing and without a default, or not text.
    """
    value = row.get(name, default)
    if value is None or (isinstance(value, float) and value != value):  # NaN is what pandas has for nothing
        value = default
    if value is None:
        raise ValueError(f"field {name!r} is missing (the row has: {_columns(row)})")
    return as_text(value, f"field {name!r}")


def messages_field(row: Row, name: str = "messages") -> list[Turn]:
    """A chat as turns {"role": system|user|assistant|tool, "content": text, ...}, with at least one answer.

    Raises:
        ValueError: not a list of turns, an unknown role, no text, or no answer.
    """
    return check_answers(chat_turns(row.get(name), name), name)
