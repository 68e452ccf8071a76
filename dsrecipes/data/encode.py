"""Records to token ids and labels, for a batch of records at a time (chats in a tokenizer's own template: chat.py).

Prompt and response are encoded apart and concatenated, so the mask boundary is exact whatever the tokenizer merges.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from dsrecipes.errors import UserError

IGNORE = -100
"""Label of a position that is not trained on (torch's cross_entropy default)."""
Segments = list[tuple[str, bool]]
"""A sequence in pieces: (text, is it trained on)."""


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a text (UserError: the tokenizer has none)."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no eos token, so no text could end: name one in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text without special tokens."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may turn them on, and only a call of the tokenizer turns them off
    backend.no_padding()
    # the tokenizer's own call finds each token's place in the text too, which takes a quarter of its time
    return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_texts(records: list[dict], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Plain text: every token is trained on, and a document's last piece ends with eos.

    Returns:
        input_ids and labels, each a list (one per record) of lists of ints.
    """
    eos = eos_of(tokenizer)
    ids = _token_ids([record["text"] for record in records], tokenizer)
    for record, tokens in zip(records, ids, strict=True):
        if record.get("end", True):
            tokens.append(eos)
    return {"input_ids": ids, "labels": [list(tokens) for tokens in ids]}


def encode_segments(records: list[Segments], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Segments encoded apart and concatenated; labels only where a segment is trained on.

    The first segment gets the tokenizer's leading special tokens (Llama's bos); each trained segment ends with eos.
    """
    texts = [text for segments in records for text, _ in segments]
    encoded = iter(_token_ids(texts, tokenizer))
    start, eos = _leading_special_tokens(tokenizer), eos_of(tokenizer)
    batch: dict[str, list] = {"input_ids": [], "labels": []}
    for segments in records:
        ids: list[int] = []
        labels: list[int] = []
        for index, (_, trained) in enumerate(segments):
            tokens = next(encoded)
            if index == 0 and tokens[: len(start)] != start:
                tokens = start + tokens
            if trained and tokens[-1:] != [eos]:
                tokens = [*tokens, eos]
            ids += tokens
            labels += tokens if trained else [IGNORE] * len(tokens)
        batch["input_ids"].append(ids)
        batch["labels"].append(labels)
    return batch


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    special = tokenizer("")["input_ids"]
    return [token for token in special[:1] if token != tokenizer.eos_token_id or token == tokenizer.bos_token_id]


def weigh(batch: dict[str, list], weights: list[list[float]]) -> dict[str, list]:
    """Columns of encode_segments with the weights of each row's answers; an answer of weight 0 is not trained on."""
    batch["weights"] = [[] for _ in weights]
    for index, (labels, of_answers) in enumerate(zip(batch["labels"], weights, strict=True)):
        if all(weight == 1 for weight in of_answers):
            continue
        values, answer = [1.0] * len(labels), -1
        for place, label in enumerate(labels):
            if label == IGNORE:
                continue
            answer += place == 0 or labels[place - 1] == IGNORE
            values[place] = of_answers[answer]
        batch["weights"][index] = values
        batch["labels"][index] = [IGNORE if value == 0 else label for label, value in zip(labels, values, strict=True)]
    return batch
