"""What is a model asked: a row up to its answer, or a text that a person typed?

Both give the ids that training showed before an answer. A row with an answer is encoded as in training and cut where its
last answer begins. For a row without one the recipe's `prompt` hook writes what comes before it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsrecipes.data.encode import IGNORE
from dsrecipes.data.parse import with_answer
from dsrecipes.data.records import BAD_ROW
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
_STAND_IN = "answer"
"""Stands for an answer where a row has none: chat templates and row formats require one, and it is cut off again."""


@dataclass(frozen=True)
class Prompt:
    """Token ids for a model, and what they say."""

    ids: list[int]
    text: str
    reference: str | None
    """The row's own answer; None where it has none."""
    continues: bool = False
    """The model continues this text, so the white space around its answer belongs to it."""


@dataclass(frozen=True)
class PromptField:
    """The field of a row that a typed text fills."""

    field: str
    continues: bool
    """The recipe trains on every token, so that the model continues the text instead of answering it."""

    def row(self, text: str, system: str | None = None) -> Json:
        """A row that asks `text`; `system` is used only where there are messages."""
        if self.field == "messages":
            opening = [{"role": "system", "content": system}] if system else []
            return {"messages": [*opening, {"role": "user", "content": text}]}
        return {self.field: text}


def find_prompt_field(run: FinishedRun) -> PromptField:
    """Find the field that a typed text fills: the one that the recipe's `prompt` reads.

    Raises:
        UserError: the model does not write text, the recipe has no `prompt`, or it reads several fields or none.
    """
    _refuse_other_models(run)
    field = _missing_field(run, {})
    if field is None:
        raise UserError("DSR431", _no_text(run, "its method `prompt` reads no field"))
    # With that field filled, another KeyError shows that the hook reads a second one.
    row = PromptField(field, continues=False).row("")
    second = _missing_field(run, row)
    if second is not None:
        raise UserError("DSR431", _no_text(run, f"its prompts need several fields ({field}, {second}, ...)"))
    prompt = run.recipe.prompt(row, run.options)
    return PromptField(field, continues=isinstance(prompt, list) and bool(prompt) and prompt[-1][1])


def _missing_field(run: FinishedRun, record: Json) -> str | None:
    """The first field that the recipe's `prompt` does not find in a record.

    Raises:
        UserError: the recipe has no `prompt`.
    """
    # Hooks do not declare their fields: the KeyError of an incomplete record names the next one.
    try:
        prompt = run.recipe.prompt(record, run.options)
        if prompt is None:
            raise UserError("DSR431", _no_text(run, "it has no method `prompt`"))
        if isinstance(prompt, dict):
            prompt["messages"]
    except KeyError as error:
        return str(error.args[0])
    return None


def _no_text(run: FinishedRun, reason: str) -> str:
    return (
        f"recipe {run.config.layers.recipe.name}: {reason}, so a typed text has no place in a row; "
        "`dsrecipes generate RUN --prompts FILE` takes whole rows"
    )


def _refuse_other_models(run: FinishedRun) -> None:
    auto_class = run.recipe.auto_class
    if not auto_class.endswith("ForCausalLM"):
        is_classifier = auto_class.endswith("ForSequenceClassification")
        does = "gives a text its label" if is_classifier else "answers questions with four options"
        raise UserError("DSR430", f"{run.folder.path}: this model does not write text; it {does}")


def prompt_of(run: FinishedRun, row: Json) -> Prompt:
    """A row, with or without its answer, as the recipe's training rows show it up to the last answer.

    A recipe that trains on every token (gpt2_clm) has no answer in its rows: the whole text is the prompt.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the row lacks a field, or has a token that the model has no
            embedding for; the message names it.
        UserError: the recipe's model does not write text.
    """
    from dsrecipes.model.tokenizer import check_ids

    _refuse_other_models(run)
    record, has_answer = _record_of(run, row)
    segments = None if has_answer else run.recipe.prompt(record, run.options)
    prompt = _cut(run, record, has_answer) if segments is None else _from_hook(run, segments)
    check_ids(prompt.ids, run.tokenizer, run.embedding_rows)
    return prompt


def _record_of(run: FinishedRun, row: Json) -> tuple[Json, bool]:
    """The row's record, and whether its answer is its own.

    A row of a known format without an answer gets a stand-in. Where a user's own format_row refuses a row of another format,
    the row counts as lacking its answer if the recipe's `prompt` finds every field that it reads.
    """
    completed, has_answer = with_answer(row, _STAND_IN, reasoning=_STAND_IN if run.reasons else "")
    if len(completed) > len(row):
        # The recipe's own rows may have their answer under another name.
        with contextlib.suppress(*BAD_ROW):
            return run.recipe.format_row(row), True
    try:
        return run.recipe.format_row(completed), has_answer
    except BAD_ROW as error:
        if not has_answer or run.recipe.format_row.__module__.startswith("dsrecipes."):
            raise
        try:
            prompt = run.recipe.prompt(dict(row), run.options)
        except BAD_ROW:
            raise error from None
        if prompt is None:
            raise ValueError(f"{error}; rows without an answer need a method `prompt` in the recipe") from error
        return dict(row), False


def _from_hook(run: FinishedRun, prompt: Any) -> Prompt:
    """Encode what a recipe's `prompt` returned: segments, or a chat in the tokenizer's template."""
    from dsrecipes.data.chat import encode_chats
    from dsrecipes.data.encode import encode_segments

    if isinstance(prompt, dict):
        turns = prompt["messages"]
        # Only answers are labelled, and the labels say where to cut.
        if turns[-1]["role"] != "assistant":
            turns = [*turns, {"role": "assistant", "content": _STAND_IN}]
        encoded = encode_chats([_with_weights(prompt | {"messages": turns})], run.tokenizer, run.options)
        ids, labels = encoded["input_ids"][-1], encoded["labels"][-1]
        ids = ids[: _last_answer(labels)[0]]
        return Prompt(ids, str(run.tokenizer.decode(ids)), None)
    ids = encode_segments([prompt], run.tokenizer)["input_ids"][0]
    continues = prompt[-1][1]
    # The end token closes a text in training; after it there is nothing to continue.
    if continues and ids[-1:] == [run.tokenizer.eos_token_id]:
        ids = ids[:-1]
    return Prompt(ids, str(run.tokenizer.decode(ids)), None, continues)


def _cut(run: FinishedRun, record: Json, has_answer: bool) -> Prompt:
    """A record encoded as in training, up to its last answer."""
    encoded = run.recipe.encode([_with_weights(record)], run.tokenizer, run.options)
    # A long chat becomes several sequences, of which the last has the last answer.
    ids, labels = encoded["input_ids"][-1], encoded["labels"][-1]
    if all(label != IGNORE for label in labels):
        ids = ids[:-1] if ids[-1:] == [run.tokenizer.eos_token_id] else ids
        return Prompt(ids, str(run.tokenizer.decode(ids)), None, continues=True)
    start, end = _last_answer(labels)
    reference = str(run.tokenizer.decode(ids[start:end], skip_special_tokens=True)).strip() if has_answer else None
    return Prompt(ids[:start], str(run.tokenizer.decode(ids[:start])), reference)


def _last_answer(labels: list[int]) -> tuple[int, int]:
    """Begin and end of the last labelled tokens; a chat template may write something after an answer."""
    end = len(labels)
    while end and labels[end - 1] == IGNORE:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return start, end


def _with_weights(record: Json) -> Json:
    """The record with weight 1 instead of 0, because answers that are not trained on have prompts too."""
    record = record | {"weight": 1.0} if record.get("weight") == 0 else record
    turns = record.get("messages")
    if not isinstance(turns, list):
        return record
    return record | {"messages": [turn | {"weight": 1.0} if turn.get("weight") == 0 else turn for turn in turns]}
