"""How does a chat become token ids and labels?

The chat is rendered with the tokenizer's chat template (chat_template.py) and the answers are located in the text
(chat_answers.py). Here the text is tokenized once, and the answers are mapped to tokens by their character offsets.

Where the tokenizer merges the end of a prompt and the beginning of the answer into one token, the prompt is tokenized
separately, as a server would do it, and each answer becomes a sequence of its own. The same holds for a template that ends
answers with no token: eos is appended to each sequence, where a server would stop, because eos does not occur inside a chat.
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
"""First token, token after the last, weight."""
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
    # tool calls may end with a token of their own, such as <|eom_id|> of Llama 3.1
    ends: list[int] = []
    for answer in ({"role": "assistant", "content": "2"}, call):
        try:
            texts, _ = render_chat(template, {"messages": [question, answer]}, options)
        except ValueError:
            continue  # the template does not take tool calls
        ids, answers = next(_encoded(texts, tokenizer))[-1]
        end = answers[-1][1]
        # a slice, because an answer may have no token at all
        ends += [token for token in ids[end - 1 : end] if token not in ends]
    return ends


def _append(batch: dict[str, list], ids: list[int], answers: list[Answer]) -> None:
    """Add a sequence to the columns."""
    labels = [IGNORE] * len(ids)
    for first, end, _ in answers:
        labels[first:end] = ids[first:end]
    # an empty list means weights of 1: most chats have no others, and then the column costs nothing
    weights = []
    if any(weight != 1 for *_, weight in answers):
        weights = [1.0] * len(ids)
        for first, end, weight in answers:
            weights[first:end] = [weight] * (end - first)
    batch["input_ids"].append(ids)
    batch["labels"].append(labels)
    batch["weights"].append(weights)


@dataclass
class _Boundary:
    """Where an answer begins in the tokens of the text, and the end of its prompt, which shows whether that is exact.

    Exact means that a server, which tokenizes the prompt without the answer, gets the same ids. Only the text after the last
    added token needs to be compared, because tokenizers split a text at added tokens before anything else.
    """

    first: int
    """First token of the answer."""
    begin: int
    """The last added token before it."""
    tail: str
    """The text from there to the answer."""


def _encoded(texts: list[RenderedChat], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Encoded]]:
    """Encode each text as one sequence, or as one for each answer where a prompt's ids are not those that a server sends."""
    if not tokenizer.is_fast:
        yield from ([_encode_without_offsets(text, tokenizer)] for text in texts)
        return
    # the backend itself, because a call of the tokenizer would convert every result to Python lists
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
                (boundary.first, _token_after(encoding, piece.end, len(ids)), piece.weight)
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
    """Cut the sequence after the last answer, or append eos where the template ends the answer with no token."""
    if not last:
        return ids, answers
    first, end, weight = answers[-1]
    if last[0].end is not None:
        # what the template writes after the end token, such as a line break, has no label and would only cost time
        return ids[:end], answers
    return [*ids, eos_of(tokenizer)], [*answers[:-1], (first, len(ids) + 1, weight)]


@functools.lru_cache(maxsize=2)
def _backend(tokenizer: PreTrainedTokenizerBase, size: int) -> Tokenizer:
    """Copy the tokenizer's backend so that offsets are complete: byte-level post-processors trim blanks from them.

    `size` is part of the cache key, because tokens can be added to a tokenizer.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None  # adds special tokens, which the template has written already, and changes nothing else
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_at(encoding: Any, start: int, size: int) -> int:
    """Find the first token that covers text from character `start` on; `size` is the length of the text."""
    token = encoding.char_to_token(start) if start < size else None
    if token is None:  # a character that the tokenizer drops
        offsets = encoding.offsets
        token = next((index for index, (_, end) in enumerate(offsets) if end > start), len(offsets))
    # a token of no characters at the same place, such as a word-begin mark, belongs to the answer
    while token and encoding.token_to_chars(token - 1) == (start, start):
        token -= 1
    return token


def _token_after(encoding: Any, end: int | None, size: int) -> int:
    """Find the token after the one that ends at character `end`; `size` is the number of tokens."""
    if end is None:
        return size
    token = encoding.char_to_token(end - 1)
    return size if token is None else token + 1


def _encode_with_separate_prompt(piece: Piece, backend: Tokenizer, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode the prompt separately and append the tokens of the answer; a token with parts of both is cut."""
    encoding = backend.encode(piece.text, add_special_tokens=False)
    ids = encoding.ids
    first = _token_at(encoding, piece.start, len(piece.text))
    end = _token_after(encoding, piece.end, len(ids))
    prompt = backend.encode(piece.text[: piece.start], add_special_tokens=False).ids
    if piece.opened and backend.encode(piece.opened, add_special_tokens=False).ids[: len(prompt)] != prompt:
        # the block begins inside a token: the prompt ends before it, as that of the server does
        return _ended(ids, [(first, end, piece.weight)], [piece], tokenizer)
    rest: list[int] = []
    begin, stop = encoding.token_to_chars(first) or (piece.start, piece.start)
    if begin < piece.start:
        rest = _cut_token(encoding.tokens[first], piece.text[piece.start : stop], backend)
        first += 1
    answer = (len(prompt), len(prompt) + len(rest) + end - first, piece.weight)
    return _ended([*prompt, *rest, *ids[first:]], [answer], [piece], tokenizer)


def _cut_token(token: str, tail: str, backend: Tokenizer) -> list[int]:
    """Encode the end of a token that holds the text `tail`.

    The cut is counted from the end, because a token may begin with a mark that is in no text (the "▁" of SentencePiece). It is
    counted in characters, or in bytes for byte-level tokenizers.
    """
    size = len(tail) if token.endswith(tail.replace(" ", "▁")) else len(tail.encode())
    return [part.id for part in backend.model.tokenize(token[len(token) - size :])]


def _encode_without_offsets(text: RenderedChat, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode with a slow tokenizer: an answer begins where the ids of its prompt and of the whole text diverge.

    Raises:
        UserError: the ids of the text up to the end of an answer are not a prefix of the whole text's ids.
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
