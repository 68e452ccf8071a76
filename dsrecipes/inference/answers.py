"""Prompts in the recipe's own format, and a model's answers to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsrecipes.data.encode import IGNORE
from dsrecipes.data.parse import with_answer
from dsrecipes.data.records import BAD_ROW
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
_ANSWER = "answer"
"""Stands where a row has no answer yet: the recipe's encoding wants one, and it is cut off again."""


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and what the row says the answer is (None where it says nothing)."""

    ids: list[int]
    text: str
    reference: str | None
    continues: bool = False
    """The model goes on with this text: the blanks that its answer begins and ends with are part of it."""


def prompt_of(run: FinishedRun, row: Json) -> Prompt:
    """A row, with or without its answer, as the recipe's training rows show it up to the last answer.

    A recipe that trains on every token (gpt2_clm) has no answer in its rows: the whole text is the prompt.

    Raises:
        ValueError: the row lacks a field, or holds a token that the model has no row for; the message names it.
        UserError: the recipe's model does not write text.
    """
    if not run.recipe.auto_class.endswith("ForCausalLM"):
        is_classifier = run.recipe.auto_class.endswith("ForSequenceClassification")
        does = "gives a text its label" if is_classifier else "answers questions with four options"
        raise UserError(f"{run.folder.path}: this model does not write text; it {does}")
    from dsrecipes.model.tokenizer import check_ids

    asked, answered = _with_answer(run, row)
    encoded = run.recipe.encode([_weighed(run.recipe.format_row(asked))], run.tokenizer, run.options)
    ids, labels = encoded["input_ids"][-1], encoded["labels"][-1]  # of several sequences the last has the last answer
    check_ids(ids, run.tokenizer, run.embedding_rows)
    if all(label != IGNORE for label in labels):
        ids = ids[:-1] if ids[-1:] == [run.tokenizer.eos_token_id] else ids
        return Prompt(ids, run.tokenizer.decode(ids), None, continues=True)
    start = len(labels)
    while start and labels[start - 1] == IGNORE:  # what a chat template writes behind the answer
        start -= 1
    end = start
    while start and labels[start - 1] != IGNORE:
        start -= 1
    reference = run.tokenizer.decode(ids[start:end], skip_special_tokens=True).strip() if answered else None
    return Prompt(ids[:start], run.tokenizer.decode(ids[:start]), reference)


def _weighed(record: Json) -> Json:
    """The record with weight 1 in place of 0: answers that are not trained on have prompts too."""
    record = record | {"weight": 1.0} if record.get("weight") == 0 else record
    turns = record.get("messages")
    if not isinstance(turns, list):
        return record
    return record | {"messages": [turn | {"weight": 1.0} if turn.get("weight") == 0 else turn for turn in turns]}


def _with_answer(run: FinishedRun, row: Json) -> tuple[Json, bool]:
    """The row with something where its answer belongs, and whether it had one."""
    changed, answered = with_answer(row, _ANSWER, reasoning=_ANSWER if run.reasons else "")
    if len(changed) > len(row):  # a recipe of the user's own may call its answer something else
        with contextlib.suppress(*BAD_ROW):
            run.recipe.format_row(row)
            return row, True
    return changed, answered


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: GenerationConfig,
    batch_size: int = 8,
    strip: bool = True,
) -> Iterator[tuple[int, str]]:
    """(index of the prompt, answer) as batches end: sorted by length, the longest first, left-padded.

    Args:
        prompts: token ids of each; longest first shows at once whether memory is enough.
        settings: transformers' own, with max_new_tokens set.
        strip: take the blanks at both ends of an answer off; not for prompts that the model goes on with.

    Raises:
        UserError: a prompt and its answer have no room in the model's positions.
    """
    import torch

    from dsrecipes.model.router import without_router_logits

    room = positions(model)
    longest = max(map(len, prompts), default=0)
    if room and longest + settings.max_new_tokens > room:
        number = next(index for index, ids in enumerate(prompts) if len(ids) == longest)
        raise UserError(
            f"prompt {number + 1} has {longest} tokens, and with {settings.max_new_tokens} new ones they pass the model's "
            f"{room} positions: shorten it, or give a smaller --max_new_tokens"
        )
    pad = settings.pad_token_id
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = len(prompts[chosen[0]])
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=model.device)
        with torch.no_grad():
            written = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, **without_router_logits(model)
            )
        for index, tokens in zip(chosen, written[:, width:].tolist(), strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            yield index, text.strip() if strip else text


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens prompt and answer may have together; None where the model sets no end."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def generation_settings(run: FinishedRun, model: PreTrainedModel, **changes: Any) -> GenerationConfig:
    """Greedy decoding of up to 256 new tokens that ends at eos, with changes by transformers' own names.

    A temperature above 0 turns sampling on, 0 turns it off.

    Raises:
        UserError: a name that GenerationConfig does not know, or a value that it refuses.
    """
    from transformers import GenerationConfig

    from dsrecipes.errors import nearest
    from dsrecipes.model.task import pad_id

    known = vars(GenerationConfig())
    for name in changes:
        if name not in known:
            raise UserError(f"unknown generation setting {name!r}{nearest(name, known)}")
    values: Json = {"max_new_tokens": 256, "do_sample": False} | changes
    if "temperature" in values:
        values["do_sample"] = values["temperature"] > 0
        if not values["do_sample"]:
            del values["temperature"]
    ends = end_tokens(model, run.tokenizer, run.options.prompt_style == "chat")
    try:
        return GenerationConfig(pad_token_id=pad_id(run.tokenizer), eos_token_id=ends, **values)
    except (ValueError, TypeError) as error:
        raise UserError(f"generation settings: {str(error).splitlines()[0]}") from error


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int] | None:
    """Ids at which generation stops: the model's own, and those that the chat template ends answers with."""
    from dsrecipes.data.chat import end_ids

    own = (model.generation_config and model.generation_config.eos_token_id) or tokenizer.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    ends = end_ids(tokenizer) if chat and tokenizer.chat_template else []
    return [*own, *(token for token in ends if token not in own)] or None
