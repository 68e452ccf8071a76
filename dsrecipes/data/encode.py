"""Records to token ids and labels, for a batch of records at a time.

Prompt and response are encoded apart and concatenated, so the mask boundary is exact whatever the tokenizer merges.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dsrecipes.data.template import render
from dsrecipes.errors import UserError

IGNORE = -100
"""Label of a position that is not trained on (torch's cross_entropy default)."""
Segments = list[tuple[str, bool]]
"""A sequence in pieces: (text, is it trained on)."""


@dataclass(frozen=True)
class EncodeOptions:
    """All that changes tokens, and so the cache key."""

    max_length: int
    prompt_style: str
    problem_type: str = "auto"


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
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
    eos = _eos(tokenizer)
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
    start, eos = _leading_special_tokens(tokenizer), _eos(tokenizer)
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


def chat_segments(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Segments:
    """A chat in the tokenizer's own template, cut where each answer begins and ends.

    Raises:
        UserError: the tokenizer has no chat template.
        ValueError: the template rewrites earlier turns, so that no answer can be cut out.
    """
    if not tokenizer.chat_template:
        raise UserError("--prompt_style chat: this tokenizer has no chat template; use --prompt_style alpaca")
    segments: Segments = []
    done = ""
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:index], True)
        answered = render(tokenizer, messages[: index + 1], False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise ValueError("the tokenizer's chat template rewrites earlier turns; use --prompt_style alpaca")
        answer, rest = answered[len(asked) :], ""
        if tokenizer.eos_token and tokenizer.eos_token in answer:
            cut = answer.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
            answer, rest = answer[:cut], answer[cut:]
        segments += [(asked[len(done) :], False), (answer, True)]
        done = answered[: len(answered) - len(rest)]
    return segments
