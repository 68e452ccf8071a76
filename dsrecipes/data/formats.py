"""Which formats of rows are known, and what are their columns called? One table.

A new format is one more entry in FORMATS. Everything else is derived from the table: which format a row has, the `rows` line of
the header, the names that --columns may map to, messages about unknown rows, prompts without an answer, and the table in the
documentation (`documented`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dsrecipes.data.fields import EMPTY, Row, as_text, list_columns, text_field
from dsrecipes.data.turns import Turn, chat_turns, check_answers
from dsrecipes.data.usage import ReadRow

_ANSWERS = ("output", "completion", "response", "answer", "solution", "target", "targets")
EXTRA_COLUMNS = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "weight": ("weight",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
"""What a row of any format may have besides prompt and answer -> names of the column, in lower case."""
_NO_TEXT = re.compile(r"\s*|\W*no ?input\W*|<?NA>?|N/A|nan|null|none", flags=re.IGNORECASE)
"""What files write for an input that is missing: nothing, noinput, <noinput>, and pandas' or R's nan, None, NA, <NA>."""


@dataclass(frozen=True)
class Match:
    """A format that fits the columns of a row, and the names that these columns have in the row."""

    format: RowFormat
    prompt: str
    answer: str | None
    """None where the row has no column for it, or the prompt column holds the answer too."""
    extra: dict[str, str]
    """Key of EXTRA_COLUMNS -> column."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """A format of rows with a prompt and an answer: names of columns, and a parser.

    Names are tried in order and in any letter case, because public data sets agree on the shapes but not on the names.
    """

    name: str
    """In the header, in the plural: `120 Alpaca rows (instruction, output)`."""
    prompt: tuple[str, ...]
    """Names that the column of the prompt may have, in lower case, the preferred one first."""
    answer: tuple[str, ...] = ()
    """The same for the answer; empty where the prompt column holds a complete chat."""
    parse: Callable[[Row, Match], dict[str, Any]]
    """Returns {"instruction", "input", "output"} or {"messages": turns}; raises ValueError for a faulty row."""
    fallback: bool = False
    """Only used where no other format fits."""

    @property
    def columns(self) -> str:
        """The preferred names of its columns, for messages: `instruction, output`."""
        return ", ".join(names[0] for names in (self.prompt, self.answer) if names)


# ---- parsers ----


def parse_chat(row: Row, match: Match) -> dict[str, Any]:
    """Read a chat from one column."""
    unused: set[str] = set()
    turns = chat_turns(row.get(match.prompt), match.prompt, unused)
    if unused and type(row) is ReadRow:
        row.unused = unused
    return {"messages": turns}


def parse_pair(row: Row, match: Match) -> dict[str, Any]:
    """Read a prompt and an answer from two columns; as in TRL each may hold turns instead of a text."""
    prompt = row.get(match.prompt)
    answer = row.get(match.answer) if match.answer is not None else None
    if answer is None or match.answer is None:
        raise ValueError(_missing_answer(row, match))
    if _holds_turns(prompt) or _holds_turns(answer):
        return {"messages": _pair_turns(prompt, answer, match.prompt, match.answer)}
    record = {"instruction": text_field(row, match.prompt), "output": text_field(row, match.answer)}
    context = match.extra.get("input")
    record["input"] = optional_text(row, context) if context not in (None, match.prompt) else ""
    if not record["instruction"].strip() and not record["input"].strip():
        raise ValueError(f"field {match.prompt!r} is empty")
    if not record["output"].strip():
        raise ValueError(f"field {match.answer!r} is empty")
    return record


def _holds_turns(value: Any) -> bool:
    if isinstance(value, dict):  # Arrow's struct of lists
        return bool(value) and all(isinstance(column, list) for column in value.values())
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _pair_turns(prompt: Any, answer: Any, prompt_column: str, answer_column: str) -> list[Turn]:
    if _holds_turns(prompt):
        turns = chat_turns(prompt, prompt_column)
        for turn in turns:  # TRL trains on the completion alone
            if turn["role"] == "assistant":
                turn["weight"] = 0.0
    else:
        turns = [{"role": "user", "content": as_text(prompt, f"field {prompt_column!r}")}]
    if _holds_turns(answer):
        return turns + check_answers(chat_turns(answer, answer_column), answer_column)
    return [*turns, {"role": "assistant", "content": as_text(answer, f"field {answer_column!r}")}]


def optional_text(row: Row, column: Any) -> str:
    """Return the text of a column that may hold nothing, or a word for nothing."""
    text = text_field(row, column, "")
    return "" if says_nothing(text) else text


def says_nothing(text: str) -> bool:
    """Return whether a text is blank, or one of the words that files write for a missing text."""
    return bool(_NO_TEXT.fullmatch(text))


def _missing_answer(row: Row, match: Match) -> str:
    if "chosen" in match.extra:
        chosen = match.extra["chosen"]
        target = CHAT.prompt[0] if isinstance(row.get(chosen), list) else match.format.answer[0]
        return (
            "a preference row (chosen, rejected), and this recipe trains on one answer: --columns "
            f"{target}={chosen} trains on the chosen one"
        )
    return f"field {match.answer or match.format.answer[0]!r} is missing (the row has: {list_columns(row)})"


# ---- the table ----

CHAT = RowFormat(
    name="chats",
    prompt=("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns"),
    parse=parse_chat,
)
FORMATS: tuple[RowFormat, ...] = (
    CHAT,
    RowFormat(name="Alpaca rows", prompt=("instruction",), answer=("output", *_ANSWERS), parse=parse_pair),
    RowFormat(name="prompts and completions", prompt=("prompt",), answer=("completion", *_ANSWERS), parse=parse_pair),
    RowFormat(name="queries and responses", prompt=("query",), answer=("response", *_ANSWERS), parse=parse_pair),
    RowFormat(name="questions and answers", prompt=("question",), answer=("answer", *_ANSWERS), parse=parse_pair),
    RowFormat(name="problems and solutions", prompt=("problem",), answer=("solution", *_ANSWERS), parse=parse_pair),
    # next to an instruction, `input` is its context
    RowFormat(
        name="inputs and outputs",
        prompt=("input", "inputs"),
        answer=("output", *_ANSWERS),
        parse=parse_pair,
        fallback=True,
    ),
)
"""Formats for recipes that train on answers; where several fit a row, the first one counts."""
TEXT_NAME = "texts"
"""In the header, of rows for recipes that train on plain text."""
TEXT_COLUMNS = (
    "text",
    "content",
    "contents",
    "document",
    "raw_content",
    "page_content",
    "passage",
    "article",
    "story",
    "body",
    "code",
)
"""Names of the column of such rows, the preferred one first."""


def documented() -> list[tuple[str, str, str]]:
    """Return the table for the documentation: name, columns of the prompt, columns of the answer."""

    def names(columns: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in dict.fromkeys(columns))

    rows = [(format.name, names(format.prompt), names(format.answer)) for format in FORMATS]
    return [*rows, (TEXT_NAME, names(TEXT_COLUMNS), "")]


# ---- which format a row has ----


def match_row(row: Row) -> Match | None:
    """Find the format of a row: the first one whose columns hold something; None where no format fits.

    In files of several formats each row has all columns, and those of the other formats are empty.
    """
    # cached by columns, because the rows of a file have few combinations of columns
    matches = _matches_of(row)
    if len(matches) < 2:
        return matches[0] if matches else None
    # dict.get, because row.get would count the column as used (usage.ReadRow)
    with_prompt = [match for match in matches if dict.get(row, match.prompt) not in EMPTY]
    # a prompt without an answer loses against a format that has one, such as a chat in another column
    answered = [match for match in with_prompt if match.answer is None or dict.get(row, match.answer) not in EMPTY]
    return (answered or with_prompt or list(matches))[0]


def _matches_of(row: Row) -> tuple[Match, ...]:
    return matches(tuple(dict.keys(row)), getattr(row, "mapped", ()))


@lru_cache(maxsize=4096)
def matches(columns: tuple[Any, ...], mapped: tuple[str, ...]) -> tuple[Match, ...]:
    """Find the formats that fit these columns.

    Args:
        columns: of a row.
        mapped: those that --columns names, which come before all others.
    """
    # reversed, so that the first of two columns with the same name in lower case counts
    by_name = {str(column).strip().lower(): column for column in reversed(columns)}

    def find(aliases: tuple[str, ...]) -> Any:
        present = [by_name[alias] for alias in aliases if alias in by_name]
        return next((column for column in present if column in mapped), present[0] if present else None)

    # extra columns are looked up for every format: a system prompt or tools may accompany any of them
    extra = {part: find(aliases) for part, aliases in EXTRA_COLUMNS.items()}
    extra = {part: column for part, column in extra.items() if column is not None}
    candidates = [
        Match(format, by_name[name], find(format.answer), extra)
        for format in FORMATS
        for name in format.prompt
        if name in by_name
    ]
    candidates = [match for match in candidates if not match.format.fallback] or candidates
    # columns that the user maps are the ones to train on, whatever else the row has
    most = max((_count_mapped(match, mapped) for match in candidates), default=0)
    return tuple(match for match in candidates if _count_mapped(match, mapped) == most)


def _count_mapped(match: Match, mapped: tuple[str, ...]) -> int:
    return len({match.prompt, match.answer} & set(mapped))


def text_column(row: Row) -> str | None:
    """Find the column of plain text in a row: the first one that holds something; None where there is none."""
    columns = _text_columns(tuple(dict.keys(row)), getattr(row, "mapped", ()))
    return next((name for name in columns if dict.get(row, name) is not None), columns[0] if columns else None)


@lru_cache(maxsize=4096)
def _text_columns(columns: tuple[Any, ...], mapped: tuple[str, ...]) -> list[Any]:
    by_name = {str(column).strip().lower(): column for column in reversed(columns)}
    present = [by_name[alias] for alias in TEXT_COLUMNS if alias in by_name]
    return sorted(present, key=lambda column: column not in mapped)


def unknown_format(row: Row) -> str:
    """Say what is wrong with a row that no format fits."""
    by_name = {str(column).strip().lower(): column for column in dict.keys(row)}
    if "chosen" in by_name and "rejected" in by_name:
        return (
            "a preference row (chosen, rejected), and this recipe trains on one answer: where `chosen` is a list of turns, "
            f"--columns {CHAT.prompt[0]}={by_name['chosen']} trains on it"
        )
    if {"role", "from"} & by_name.keys() and {"content", "value"} & by_name.keys():
        return 'a single turn, where a row must be a whole chat: [{"role": "user", ...}, {"role": "assistant", ...}]'
    # the cheap explanations come first; the complete list of formats only helps where none of them applies
    known = "; ".join(format.columns for format in FORMATS if not format.fallback)
    text = next((by_name[name] for name in TEXT_COLUMNS if name in by_name), None)
    plain = f". For plain text (field {text!r}) use the recipe gpt2_clm" if text is not None else ""
    return (
        f"no known format of rows: the row has {list_columns(row)}; expected one of: {known}{plain}. Other names are mapped "
        "with --columns instruction=COLUMN,output=COLUMN"
    )
