"""What a typed text is to a recipe: which field of a row it fills."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsrecipes.data.encode import IGNORE
from dsrecipes.data.records import BAD_ROW
from dsrecipes.errors import UserError
from dsrecipes.inference.answers import Prompt, prompt_of

if TYPE_CHECKING:
    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
_PROBE = "Where is the station"


@dataclass(frozen=True)
class PromptField:
    """The field that a typed text fills, and what a row needs beside it."""

    field: str
    rest: Json
    """Fields that the recipe reads but the prompt does not show: the answer's."""
    continues: bool
    """The recipe trains on every token, so that the model goes on with the text instead of answering it."""

    def row(self, text: str, system: str | None = None) -> Json:
        """A row that asks `text`; `system` only where there are messages."""
        if self.field == "messages":
            first = [{"role": "system", "content": system}] if system else []
            return {"messages": [*first, {"role": "user", "content": text}]}
        return {self.field: text}


def find_asking(run: FinishedRun) -> PromptField:
    """How to ask this run's model: messages, an instruction, a text, or the one field of a recipe of the user's own.

    Raises:
        UserError: the model does not write text, or its rows ask for several fields, or for none.
    """
    for asking in (PromptField("messages", {}, False), PromptField("instruction", {}, False), PromptField("text", {}, True)):
        try:
            prompt = prompt_of(run, asking.row(_PROBE))
        except BAD_ROW:
            continue
        if _PROBE in prompt.text:
            return PromptField(asking.field, {}, _continues(run, asking.row(_PROBE) | {"output": "answer"}))
    return _own_field(run)


class _AnyRow(dict):
    """A row that has every field that is read."""

    def __missing__(self, name: str) -> str:
        self[name] = f"the {name} probe"
        return self[name]

    def get(self, name: str, default: Any = None) -> str:
        return self[name]

    def __contains__(self, name: object) -> bool:
        return True


def _own_field(run: FinishedRun) -> PromptField:
    row = _AnyRow()
    try:
        encoded = run.recipe.encode([run.recipe.format_row(row)], run.tokenizer, run.options)
    except BAD_ROW as error:
        raise UserError(_unknown(run, "no field of its rows that a text could fill was found")) from error
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    continues = IGNORE not in labels
    shown = run.tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if continues or label == IGNORE])
    asked = [name for name in dict(row) if f"the {name} probe" in shown]
    if len(asked) != 1:
        what = f"its prompts are made of {len(asked)} fields ({', '.join(asked)})" if asked else "its prompts show no field"
        raise UserError(_unknown(run, what))
    return PromptField(asked[0], {name: "answer" for name in row if name not in asked}, continues)


def _unknown(run: FinishedRun, what: str) -> str:
    return (
        f"recipe {run.config.layers.recipe.name}: {what}, so there is no one text to ask for; "
        "`dsrecipes generate RUN --prompts FILE` takes whole rows"
    )


def _continues(run: FinishedRun, row: Json) -> bool:
    if "messages" in row:
        row = {"messages": [*row["messages"], {"role": "assistant", "content": "answer"}]}
    return IGNORE not in run.recipe.encode([run.recipe.format_row(row)], run.tokenizer, run.options)["labels"][0]


def ask(run: FinishedRun, row: Json, asking: PromptField | None) -> Prompt:
    """prompt_of, also for a row of the user's own recipe that has no answer yet.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: what the recipe's hooks say of a bad row.
    """
    if asking is None or asking.rest.keys() <= row.keys():
        return prompt_of(run, row)
    return replace(prompt_of(run, asking.rest | row), reference=None)
