"""How does a row of a known format become the record that a recipe trains on, and what is its prompt without the answer?"""

from __future__ import annotations

from copy import copy
from typing import Any

from dsrecipes.config.values import as_weight
from dsrecipes.data.fields import EMPTY, Row, list_columns, text_field
from dsrecipes.data.formats import TEXT_NAME, Match, match_row, optional_text, says_nothing, text_column, unknown_format
from dsrecipes.data.tools import tool_schemas
from dsrecipes.data.turns import Turn, chat_turns, check_answers, raw_turns
from dsrecipes.data.usage import name_format


def instruction_record(row: Row) -> dict[str, Any]:
    """Read a row of any format as {"instruction", "input", "output"}, or as {"messages": turns} and perhaps `tools`.

    Messages are the record of a chat, and of an instruction where the row also has a system prompt, earlier turns or tools.
    A `weight` column that is not 1 becomes the record's weight.

    Raises:
        ValueError: no format fits the row, a field is missing or has the wrong type, or a turn has a fault.
    """
    match = match_row(row)
    if match is None:
        raise ValueError(unknown_format(row))
    record = match.format.parse(row, match)
    extra = match.extra
    system = optional_text(row, extra["system"]) if "system" in extra else ""
    history = _history(row, extra["history"]) if "history" in extra else []
    tools = tool_schemas(row.get(extra["tools"]), extra["tools"]) if "tools" in extra else []
    # a chat only where it must be one: --prompt_style alpaca has a prompt for plain instructions
    if system or history or tools or "messages" in record:
        turns = record["messages"] if "messages" in record else as_turns(record)
        # some data sets have the system prompt both as a column and as the first turn
        is_repeated = turns[0] == {"role": "system", "content": system}
        opening: list[Turn] = [{"role": "system", "content": system}] if system and not is_repeated else []
        record = {"messages": check_answers([*opening, *history, *turns], match.prompt)}
        if tools:
            record["tools"] = tools
    return _weighted(row, match, record)


def _weighted(row: Row, match: Match, record: dict[str, Any]) -> dict[str, Any]:
    """Add the weight of a row, and record its format for the header."""
    column = match.extra.get("weight")
    given = row.get(column) if column is not None else None
    if given not in EMPTY:
        weight = as_weight(given, f"field {column!r}")
        if weight != 1:
            record["weight"] = weight
    name_format(row, match.format.name)
    return record


def as_turns(record: dict[str, Any]) -> list[Turn]:
    """Return a record of an instruction as a chat of two turns."""
    question = "\n\n".join(filter(None, (record["instruction"], record["input"])))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _history(row: Row, column: Any) -> list[Turn]:
    """Read earlier turns: [question, answer] pairs, or turns."""
    value = row.get(column)
    if value in EMPTY:
        return []
    if isinstance(value, str) and (says_nothing(value) or value.strip() == "[]"):
        return []
    return chat_turns(value, str(column))


def text_record(row: Row) -> dict[str, Any]:
    """Read a row of plain text as {"text", "end"}; `end` false marks a piece of a longer document.

    Raises:
        ValueError: the row has no column of text.
    """
    column = text_column(row)
    if column is None:
        match = match_row(row)
        if match is not None:
            raise ValueError(
                f"this row is of the format {match.format.name!r} ({list_columns(row)}), where a text was expected: the recipe "
                "alpaca_llama_sft trains on such rows; --columns text=COLUMN takes one column as plain text"
            )
        raise ValueError(
            f"field 'text' is missing (the row has: {list_columns(row)}); --columns text=COLUMN takes another column"
        )
    record = {"text": text_field(row, column), "end": row.get("end", True)}
    name_format(row, TEXT_NAME)
    return record


# ---- prompts ----


def prompt_record(row: Row) -> tuple[dict[str, Any], str | None]:
    """Read a row, with or without an answer, as the record of its prompt.

    Returns:
        The record of instruction_record without `output`, or without the last answer and what follows it; and the text of
        that answer, None where the row has none.

    Raises:
        ValueError: as instruction_record.
    """
    # with a stand-in answer the row takes the same path as in training, so prompts cannot differ from those trained on
    complete, answered = with_answer(row, "-")
    record = instruction_record(complete)
    if "messages" in record:
        turns = record["messages"]
        last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
        answer = turns[last]["content"]
        record = record | {"messages": turns[:last]}
    else:
        answer = record["output"]
        record = {name: value for name, value in record.items() if name != "output"}
    return record, answer if answered else None


def with_answer(row: Row, answer: str, reasoning: str = "") -> tuple[Row, bool]:
    """Add `answer` to a row that has none.

    Args:
        row: of any format; one that no format fits stays as it is.
        answer: the text.
        reasoning: before the answer, for a chat whose prompt may open a block for it.

    Returns:
        The row, and whether it had an answer.
    """
    match = match_row(row)
    if match is None:
        return row, True
    if not match.format.answer:
        return _with_last_turn(row, match.prompt, answer, reasoning)
    column = match.answer if match.answer is not None else match.format.answer[0]
    value = row.get(column)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return _changed(row, column, answer), False
    return row, True


def _with_last_turn(row: Row, column: str, answer: str, reasoning: str) -> tuple[Row, bool]:
    turns = raw_turns(row.get(column), column)
    if chat_turns(turns, column)[-1]["role"] == "assistant":
        return row, True
    turn = {"role": "assistant", "content": answer} | ({"reasoning_content": reasoning} if reasoning else {})
    return _changed(row, column, [*turns, turn]), False


def _changed(row: Row, column: str, value: Any) -> Row:
    # copy and not {**row}: a MappedRow must stay one, or --columns would lose its effect
    changed = copy(row)
    changed[column] = value
    return changed
