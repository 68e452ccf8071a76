"""How does a chat become token ids and labels?

It is rendered with the tokenizer's chat template (chat_template.py), the answers are found in the text (chat_answers.py), and here the
text is tokenized once and the answers are mapped to tokens by their character offsets.

Where the tokenizer joins the end of a prompt with the beginning of the answer in one token, the prompt is tokenized by itself,
because a server sends it so; then each answer is a sequence of its own. A template that ends an answer with no token at all gets eos
at the very end of each sequence, where a server would stop, and each answer is a sequence then too: eos does not occur inside a chat.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.chat_answers import Piece, RenderedChat, render_chat
from dsrecipes.data.chat_sample import SAMPLE_CALL
from dsrecipes.data.chat_template import chat_template, common_length
from dsrecipes.data.encode import IGNORE, eos_of
from dsrecipes.data.turns import Turn
from dsrecipes.errors import UserError

Answer = tuple[int, int, float]
"""First token, token behind the last, weight."""
Encoded = tuple[list[int], list[Answer]]
"""The ids of a sequence, and its answers."""


def encode_chats(chats: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
    """Encode chats ({"messages", "tools", "weight"}), with labels on the answers and their end tokens.

    Returns:
        input_ids, labels and weights (an empty list where all are 1) of each sequence; notes, the lines for the header that
        hold for each chat; and record, the index of each sequence's chat, where a chat became several sequences.

    Raises:
        UserError: the tokenizer has no chat template.
        ValueError: the template cannot show a chat.
    """
    template = chat_template(tokenizer)
    texts: list[RenderedChat] = []
    records: list[int] = []
    notes: list[list[str]] = []
    for index, chat in enumerate(chats):
        rendered, chat_notes = render_chat(template, chat, options)
        texts += rendered
        records += [index] * len(rendered)
        notes.append(chat_notes)
    batch: dict[str, list] = {"input_ids": [], "labels": [], "weights": []}
    record_of_sequence = []
    for record, sequences in zip(records, _encoded(texts, tokenizer), strict=True):
        for ids, answers in sequences:
            _append(batch, ids, answers)
            record_of_sequence.append(record)
    batch["notes"] = notes
    return batch | {"record": record_of_sequence} if len(record_of_sequence) > len(chats) else batch


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids with which the chat template ends answers and tool calls; generation must stop at them."""
    template = chat_template(tokenizer)
    question: Turn = {"role": "user", "content": "1"}
    call: Turn = {"role": "assistant", "content": "", "tool_calls": [SAMPLE_CALL]}
    options = EncodeOptions(max_length=0, prompt_style="chat")
    ends: list[int] = []
    for answer in ({"role": "assistant", "content": "2"}, call):
        try:
            texts, _ = render_chat(template, {"messages": [question, answer]}, options)
        except ValueError:
            continue  # the template does not take tool calls
        ids, answers = next(_encoded(texts, tokenizer))[-1]
        behind = answers[-1][1]
        ends += [token for token in ids[behind - 1 : behind] if token not in ends]
    return ends


def _append(batch: dict[str, list], ids: list[int], answers: list[Answer]) -> None:
    """Add a sequence to the columns."""
    labels = [IGNORE] * len(ids)
    for first, behind, _ in answers:
        labels[first:behind] = ids[first:behind]
    weights = []
    if any(weight != 1 for *_, weight in answers):
        weights = [1.0] * len(ids)
        for first, behind, weight in answers:
            weights[first:behind] = [weight] * (behind - first)
    batch["input_ids"].append(ids)
    batch["labels"].append(labels)
    batch["weights"].append(weights)


@dataclass
class _Boundary:
    """Where an answer begins in the tokens of the whole text, and the part of the prompt that decides whether that is exact."""

    first: int
    """First token of the answer."""
    begin: int
    """The last added token before it: tokens before that one do not depend on what follows."""
    tail: str
    """The text from there to the answer; a server tokenizes it without the answer behind it."""


def _encoded(texts: list[RenderedChat], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Encoded]]:
    """Encode each text as one sequence, or as one for each answer where a prompt's ids are not those that a server sends."""
    if not tokenizer.is_fast:
        yield from ([_encode_without_offsets(text, tokenizer)] for text in texts)
        return
    backend = _backend(tokenizer, len(tokenizer))
    added = set(tokenizer.added_tokens_decoder)
    encodings = backend.encode_batch([text.text for text in texts], add_special_tokens=False)
    boundaries = [_boundaries(text, encoding, added) for text, encoding in zip(texts, encodings, strict=True)]
    # tails repeat from chat to chat, so each is encoded once
    tails = list(dict.fromkeys(boundary.tail for of_text in boundaries for boundary in of_text))
    ids_of_tail = {
        tail: encoding.ids
        for tail, encoding in zip(tails, backend.encode_batch_fast(tails, add_special_tokens=False), strict=True)
    }
    for text, encoding, of_text in zip(texts, encodings, boundaries, strict=True):
        ids = encoding.ids
        if all(ids[boundary.begin : boundary.first] == ids_of_tail[boundary.tail] for boundary in of_text):
            answers = [
                (boundary.first, _token_behind(encoding, piece.end, len(ids)), piece.weight)
                for piece, boundary in zip(text.pieces, of_text, strict=True)
            ]
            yield [_ended(ids, answers, text.pieces[-1:], tokenizer)]
        else:
            yield [_encode_with_separate_prompt(piece, backend, tokenizer) for piece in text.pieces]


def _boundaries(text: RenderedChat, encoding: Any, added: set[int]) -> list[_Boundary]:
    """Find where the answers of a text begin."""
    ids, boundaries = encoding.ids, []
    for piece in text.pieces:
        first = _token_at(encoding, piece.start, len(text.text))
        begin = next((index for index in range(first - 1, -1, -1) if ids[index] in added), 0)
        start = encoding.token_to_chars(begin)[0] if begin else 0
        boundaries.append(_Boundary(first, begin, text.text[start : piece.start]))
    return boundaries


def _ended(ids: list[int], answers: list[Answer], last: list[Piece], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Cut behind the last answer, or add eos behind it where the template ends it with no token."""
    if not last:
        return ids, answers
    first, behind, weight = answers[-1]
    if last[0].end is not None:
        return ids[:behind], answers
    return [*ids, eos_of(tokenizer)], [*answers[:-1], (first, len(ids) + 1, weight)]


@functools.lru_cache(maxsize=2)
def _backend(tokenizer: PreTrainedTokenizerBase, size: int) -> Tokenizer:
    """A copy with complete offsets: post-processors of byte-level tokenizers cut blanks off them.

    `size` is part of the cache key, because tokens can be added to a tokenizer.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None  # adds special tokens, which the template has written already, and changes nothing else
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_at(encoding: Any, start: int, size: int) -> int:
    """The first token with a part of the text from character `start` on; `size` is the length of the text."""
    token = encoding.char_to_token(start) if start < size else None
    if token is None:  # a character that the tokenizer drops
        offsets = encoding.offsets
        token = next((index for index, (_, end) in enumerate(offsets) if end > start), len(offsets))
    while token and encoding.token_to_chars(token - 1) == (start, start):
        token -= 1
    return token


def _token_behind(encoding: Any, end: int | None, size: int) -> int:
    """The token behind the one that ends at character `end`; `size` is the number of tokens."""
    if end is None:
        return size
    token = encoding.char_to_token(end - 1)
    return size if token is None else token + 1


def _encode_with_separate_prompt(piece: Piece, backend: Tokenizer, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode the prompt by itself, and put the tokens of the answer behind it; a token with parts of both is cut."""
    encoding = backend.encode(piece.text, add_special_tokens=False)
    ids = encoding.ids
    first = _token_at(encoding, piece.start, len(piece.text))
    behind = _token_behind(encoding, piece.end, len(ids))
    prompt = backend.encode(piece.text[: piece.start], add_special_tokens=False).ids
    if piece.opened and backend.encode(piece.opened, add_special_tokens=False).ids[: len(prompt)] != prompt:
        # the block begins inside a token: the prompt ends before it, as that of the server does
        return _ended(ids, [(first, behind, piece.weight)], [piece], tokenizer)
    rest: list[int] = []
    begin, stop = encoding.token_to_chars(first) or (piece.start, piece.start)
    if begin < piece.start:
        rest = _cut_token(encoding.tokens[first], piece.text[piece.start : stop], backend)
        first += 1
    answer = (len(prompt), len(prompt) + len(rest) + behind - first, piece.weight)
    return _ended([*prompt, *rest, *ids[first:]], [answer], [piece], tokenizer)


def _cut_token(token: str, tail: str, backend: Tokenizer) -> list[int]:
    """Encode the end of a token that holds the text `tail`.

    Counted from the end, because a token may begin with a mark that is in no text (the "▁" of SentencePiece). Its length is in
    characters, or in bytes for byte-level tokenizers.
    """
    size = len(tail) if token.endswith(tail.replace(" ", "▁")) else len(tail.encode())
    return [part.id for part in backend.model.tokenize(token[len(token) - size :])]


def _encode_without_offsets(text: RenderedChat, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode for a slow tokenizer: an answer begins where the ids of the text before it and of the whole text part.

    Raises:
        UserError: the ids of the text up to the end of an answer are not the beginning of the whole text's ids.
    """

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    ids, answers = ids_of(text.text), []
    for piece in text.pieces:
        first = common_length(ids_of(text.text[: piece.start]), ids)
        ended = ids if piece.end is None else ids_of(text.text[: piece.end])
        if ids[: len(ended)] != ended:
            raise UserError(
                "DSR146",
                f"--prompt_style chat: {tokenizer.name_or_path} has a tokenizer without offsets, which does not show where an "
                "answer ends; use --prompt_style alpaca, or a fast tokenizer (tokenizer.json)",
            )
        answers.append((first, len(ended), piece.weight))
    return _ended(ids, answers, text.pieces[-1:], tokenizer)
