"""Which questions are put to a judge, and to the models whose answers it compares?"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.io.paths import user_path

if TYPE_CHECKING:
    from dsrecipes.inference.finished import FinishedRun
    from dsrecipes.inference.prompting import Prompt

Json = dict[str, Any]


@dataclass(frozen=True)
class JudgedItem:
    """A question as the judge reads it, and both runs' prompts."""

    question: str
    prompt: Prompt
    other: Prompt


def read_rows(run: FinishedRun, prompts: str | None, limit: int | None) -> list[tuple[str, Json]]:
    """(where, row) of a file's rows, or of those that the run held out."""
    from dsrecipes.data.decode import SUFFIXES, suffix
    from dsrecipes.data.load import load_splits
    from dsrecipes.data.renamed import OptionalColumns, renamed
    from dsrecipes.data.row import located
    from dsrecipes.evaluation.rows import EvaluationRows

    if prompts:
        path = user_path(prompts)
        if not path.is_file() or suffix(path) not in SUFFIXES:
            known = " ".join(SUFFIXES)
            raise UserError("DSR492", f"--prompts {prompts}: no such file, or of a kind that is not read ({known})")
        splits = renamed(load_splits(str(path)), OptionalColumns(run.config.data.columns))
        rows = list(islice(chain.from_iterable(map(located, splits.values())), limit))
    else:
        held_out = EvaluationRows(run)
        # Rows of the training would favor the run.
        items = held_out.items(held_out.splits[0]) if held_out.splits[0] != "train" else []
        rows = [(item.where, item.row) for item in items[:limit]]
    if not rows:
        reason = f"--prompts {prompts}: no rows" if prompts else "the run held out no rows: give --prompts FILE"
        raise UserError("DSR493", reason)
    return rows


def judged_items(tuned: FinishedRun, other: FinishedRun, rows: list[tuple[str, Json]], against: str) -> list[JudgedItem]:
    """The rows as questions.

    Raises:
        UserError: a bad row, or one without an answer where --against reference needs it.
    """
    from dsrecipes.data.records import BAD_ROW, fault_of
    from dsrecipes.inference.prompting import prompt_of

    items = []
    for where, row in rows:
        try:
            prompt = prompt_of(tuned, row)
            other_prompt = prompt_of(other, row) if other is not tuned else prompt
            items.append(JudgedItem(_question(tuned, row, prompt), prompt, other_prompt))
        except BAD_ROW as error:
            raise UserError("DSR495", f"{where}: {fault_of(error)}") from error
        if against == "reference" and not prompt.reference:
            raise UserError("DSR494", f"{where}: the row has no answer of its own, which --against reference needs")
    return items


def _question(run: FinishedRun, row: Json, prompt: Prompt) -> str:
    """The question of a row, without the marks of the model's prompt format where the row's format is known."""
    from dsrecipes.data.parse import prompt_record
    from dsrecipes.data.records import BAD_ROW

    with contextlib.suppress(*BAD_ROW):
        record, _ = prompt_record(row)
        if "messages" not in record:
            return "\n\n".join(filter(None, (record["instruction"], record["input"])))
        turns = record["messages"]
        # A single turn needs no role.
        if len(turns) == 1:
            return turns[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    return str(run.tokenizer.decode(prompt.ids, skip_special_tokens=True))
