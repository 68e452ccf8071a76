"""How do plain texts and prompt/answer segments become token ids and labels?

Chats in a tokenizer's own template are in chat.py. Here prompt and response are encoded separately and concatenated, so that
the boundary of the loss mask is exact whatever the tokenizer would merge across it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.errors import UserError

IGNORE = -100
"""Label of a position that is not trained on (the default `ignore_index` of torch's cross_entropy)."""
Segments = list[tuple[str, bool]]
"""A sequence in segments: (text, whether it is trained on)."""


class RowHooks(Protocol):
    """The part of a recipe that the data layer uses, so that it need not import RecipeBase.

    All hooks are static: their arguments are all that may change the tokens, and make up the cache key.
    """

    cut_into_blocks: bool

    @staticmethod
    def format_row(row: dict[str, Any]) -> dict[str, Any]:
        """Convert a row to a record of plain Python objects."""

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Convert records to columns: input_ids, labels and optional others."""

    @staticmethod
    def finish(paths: dict[str, Path], held_out: bool, options: EncodeOptions) -> dict[str, str]:
        """Rewrite prepared files once all rows are known; returns new fingerprints."""


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a text (UserError: the tokenizer has none)."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "DSR100",
            f"the tokenizer of {tokenizer.name_or_path} has no eos token, so the model could not learn where a text ends: set "
            "eos_token in its tokenizer_config.json",
        )
    return tokenizer.eos_token_id


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode texts without special tokens."""
    # slow tokenizers have no backend; without warnings about long texts, which are dropped and counted later
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    # A tokenizer.json may turn truncation and padding on, and only a call of the tokenizer itself would turn them off.
    backend.no_truncation()
    backend.no_padding()
    # The tokenizer's own call computes offsets too, which takes a quarter of its time.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_texts(records: list[dict], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Encode plain text; every token is trained on, and the last piece of a document ends with eos.

    Args:
        records: {"text", "end"}; a missing `end` counts as true.
        tokenizer: needs an eos token.

    Returns:
        input_ids and labels: one list of ints for each record.

    Raises:
        UserError: the tokenizer has no eos token.
    """
    eos = eos_of(tokenizer)
    ids = _token_ids([record["text"] for record in records], tokenizer)
    for record, tokens in zip(records, ids, strict=True):
        if record.get("end", True):
            tokens.append(eos)
    return {"input_ids": ids, "labels": [list(tokens) for tokens in ids]}


def encode_segments(records: list[Segments], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Encode segments separately and concatenate them; only trained segments get labels.

    The first segment gets the tokenizer's leading special tokens (Llama's bos); each trained segment ends with eos.

    Returns:
        input_ids and labels: one list of ints for each record.

    Raises:
        UserError: the tokenizer has no eos token.
    """
    # one call for all segments, because the overhead of a call exceeds the encoding of a short text
    texts = [text for segments in records for text, _ in segments]
    encoded = iter(_token_ids(texts, tokenizer))
    prefix, eos = _leading_special_tokens(tokenizer), eos_of(tokenizer)
    batch: dict[str, list] = {"input_ids": [], "labels": []}
    for segments in records:
        ids: list[int] = []
        labels: list[int] = []
        for index, (_, trained) in enumerate(segments):
            tokens = next(encoded)
            if index == 0 and tokens[: len(prefix)] != prefix:
                tokens = prefix + tokens
            # eos is always trained on, so that the model learns to stop; once, where the text already ends with it
            if trained and tokens[-1:] != [eos]:
                tokens = [*tokens, eos]
            ids += tokens
            labels += tokens if trained else [IGNORE] * len(tokens)
        batch["input_ids"].append(ids)
        batch["labels"].append(labels)
    return batch


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the bos token, where the tokenizer puts one before a text."""
    # asked of the tokenizer and not of its attributes: many have a bos_token that they never write
    special = tokenizer("")["input_ids"]
    return [token for token in special[:1] if token != tokenizer.eos_token_id or token == tokenizer.bos_token_id]


def weigh(batch: dict[str, list], weights: list[list[float]]) -> dict[str, list]:
    """Add `weights` to the columns of encode_segments; an answer of weight 0 is not trained on.

    Args:
        batch: input_ids and labels; labels may be changed.
        weights: for each row, the weight of each of its answers, in their order.

    Returns:
        The batch with `weights`: one number for each label, or an empty list where all answers of a row weigh 1.
    """
    batch["weights"] = [[] for _ in weights]
    for index, (labels, answer_weights) in enumerate(zip(batch["labels"], weights, strict=True)):
        if all(weight == 1 for weight in answer_weights):
            continue
        values = _spread(labels, answer_weights)
        batch["weights"][index] = values
        batch["labels"][index] = [IGNORE if value == 0 else label for label, value in zip(labels, values, strict=True)]
    return batch


def _spread(labels: list[int], answer_weights: list[float]) -> list[float]:
    """Return the weight of each label: a new answer begins at each label that follows an IGNORE."""
    values, answer = [1.0] * len(labels), -1
    for position, label in enumerate(labels):
        if label == IGNORE:
            continue
        if position == 0 or labels[position - 1] == IGNORE:
            answer += 1
        values[position] = answer_weights[answer]
    return values
