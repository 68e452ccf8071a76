"""How does a model answer prompts: batches, generation settings, end tokens?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError, nearest, plural

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: GenerationConfig,
    batch_size: int = 8,
    strip: bool = True,
) -> Iterator[tuple[int, str]]:
    """Yield (index of the prompt, answer) as batches finish: sorted by length, the longest first, left-padded.

    Args:
        model: in evaluation mode.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt, in any order.
        settings: with max_new_tokens set.
        batch_size: prompts answered together.
        strip: remove the white space around an answer; not for prompts that the model continues.

    Raises:
        UserError: a prompt and its answer do not fit into the model's positions.
    """
    _check_positions(model, prompts, settings)
    # The longest first, so that too little memory shows in the first batch; similar lengths need little padding.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        written = _generate(model, [prompts[index] for index in chosen], settings)
        for index, tokens in zip(chosen, written, strict=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            yield index, text.strip() if strip else text


def _check_positions(model: PreTrainedModel, prompts: list[list[int]], settings: GenerationConfig) -> None:
    limit = positions(model)
    longest = max(map(len, prompts), default=0)
    if limit and longest + settings.max_new_tokens > limit:
        number = next(index for index, ids in enumerate(prompts) if len(ids) == longest)
        raise UserError("DSR432", f"prompt {number + 1}: {too_long(longest, settings.max_new_tokens, limit)}")


def too_long(tokens: int, max_new_tokens: int, limit: int) -> str:
    """Describe a prompt that leaves no room for its answer."""
    return (
        f"{plural(tokens, 'token')} and {max_new_tokens} new ones exceed the model's {limit} positions: shorten it, or give a "
        "smaller --max_new_tokens"
    )


def _generate(model: Any, prompts: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """Generate the new tokens of a batch of prompts, of which the first is the longest."""
    import torch

    from dsrecipes.model.router import without_router_logits

    width = len(prompts[0])
    # Padding to the left, because generate() appends to the end of each row.
    padded = [[settings.pad_token_id] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    with torch.no_grad():
        written = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
            **without_router_logits(model),
        )
    return written[:, width:].tolist()


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens prompt and answer may have together; None where the model sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def generation_settings(run: FinishedRun, model: PreTrainedModel, **changes: Any) -> GenerationConfig:
    """Greedy decoding of up to 256 new tokens that ends at eos, with changes by transformers' own names.

    A temperature above 0 turns sampling on, 0 turns it off.

    Raises:
        UserError: a name that GenerationConfig does not know, or a value that it refuses.
    """
    from transformers import GenerationConfig

    from dsrecipes.model.task import pad_id

    known = vars(GenerationConfig())
    for name in changes:
        if name not in known:
            raise UserError("DSR433", f"unknown generation setting {name!r}{nearest(name, known)}")
    values: Json = {"max_new_tokens": 256, "do_sample": False} | changes
    if "temperature" in values:
        values["do_sample"] = values["temperature"] > 0
        # transformers warns of a temperature that greedy decoding does not use.
        if not values["do_sample"]:
            del values["temperature"]
    ends = end_tokens(model, run.tokenizer, run.options.prompt_style == "chat")
    try:
        return GenerationConfig(pad_token_id=pad_id(run.tokenizer), eos_token_id=ends, **values)
    except (ValueError, TypeError) as error:
        raise UserError("DSR434", f"generation settings: {str(error).splitlines()[0]}") from error


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int] | None:
    """Ids at which generation stops: the model's own, and those that the chat template ends answers with.

    Args:
        model: whose generation_config names its own.
        tokenizer: whose eos is taken where the model names none.
        chat: whether prompts are in the tokenizer's chat template.
    """
    from dsrecipes.data.chat import end_ids

    # An instruction-tuned model may stop at other tokens than its tokenizer's eos.
    own = (model.generation_config and model.generation_config.eos_token_id) or tokenizer.eos_token_id
    if own is None:
        own = []
    elif not isinstance(own, list):
        own = [own]
    ends = end_ids(tokenizer) if chat and tokenizer.chat_template else []
    return [*own, *(token for token in ends if token not in own)] or None
