"""A chat as token ids: rendered by the tokenizer's template, tokenized once, its answers found by character offsets.

What is trained on is what a server sends: the ids of the rendered chat, without a token added or left out. An answer
begins where the generation prompt ends, and ends with the end token that the template writes. Where the template opens a
block that the answer does not have (`<think>`), the prompt is what both renderings begin with. Where it ignores
add_generation_prompt, the header of the answer belongs to the prompt.

A chat is one sequence where the rendering of the whole chat begins with that of each of its parts. Otherwise (reasoning
of earlier turns left out, an end token behind the last turn alone) each answer is a sequence of its own, whose prompt is
what inference would render at that point. So it is where the tokenizer joins the end of a prompt with the beginning of
the answer: the prompt has the ids that a server sends. A template that ends an answer with no token at all gets eos at
the very end of each sequence, where a server would stop, and each answer is a sequence then too: eos does not stand
inside a chat.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.config.values import as_weight
from dsrecipes.data.encode import IGNORE, eos_of
from dsrecipes.data.template import render
from dsrecipes.data.turns import Turn
from dsrecipes.errors import UserError

Shape = tuple[tuple[str, bool, bool, int], ...]
"""Of each turn: its role, whether it has text, whether it has reasoning, and its number of tool calls."""
REASONING = "reasoning of answers is trained on; --reasoning drop leaves it out"
"""Note of rows with reasoning: chat and generate then let the model reason too."""
NO_REASONING = "the chat template does not show the reasoning of answers, which is not trained on"
NO_TOOLS = "the chat template does not show the definitions of tools"
NO_TEXT = "the chat template does not show the text of an answer beside its tool calls, which is not trained on"
NO_END = "the chat template ends answers with no special token of this tokenizer: eos is added behind each"
UNANSWERED = "turns after the last answer are left out: no answer follows them"
IGNORES = "the chat template ignores add_generation_prompt: what it writes before an answer is part of the prompt"
NEW_IDS = "the chat template takes ids of nine letters and digits alone: tool calls without one are numbered"
_NINE = re.compile(r"length\s*!=\s*9\b")
"""In Mistral's templates."""
_MARK = "\ue000"
"""Stands for the text of an answer; no template and no text of a user begins with it."""
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", flags=re.DOTALL)


@dataclass(frozen=True)
class Fit:
    """What is changed in a chat so that the template takes it."""

    system: Literal["keep", "later", "all"] = "keep"
    """Put the text of all system turns, or of those that do not begin the chat, before the next user turn."""
    lead: bool = False
    """Put an empty user turn before an assistant turn that begins the chat."""
    join: bool = False
    """Join neighbouring turns of one role."""
    json_arguments: bool = False
    """Give the arguments of tool calls as JSON text."""
    inline_reasoning: bool = False
    """Give reasoning between <think> and </think> before the text, as templates take it that read no field for it."""

    def changes(self) -> int:
        """How many of the four are changed."""
        return (self.system != "keep") + self.lead + self.join + self.json_arguments

    def notes(self) -> Iterator[str]:
        """What the header says about them."""
        if self.system != "keep":
            yield "the chat template refuses system turns here: their text is put before that of the next user turn"
        if self.lead:
            yield "the chat template refuses an assistant turn at the beginning: an empty user turn is put before it"
        if self.join:
            yield "the chat template refuses two turns of one role in a row: they are joined, with a blank line between"


@dataclass
class Piece:
    """A rendered chat up to one answer."""

    text: str
    start: int
    """Of the answer in the text."""
    end: int | None
    """Of its end token; None where the template writes none."""
    weight: float = 1.0
    own_prompt: bool = False
    """The prompt is not what the rendering of the answered chat begins with."""
    opened: str = ""
    """The generation prompt, where it ends with a block that the answer does not have."""


@dataclass
class Sequence:
    """A text to be tokenized, and the answers in it, the last of which ends it."""

    text: str
    pieces: list[Piece] = field(default_factory=list)


def encode_chats(chats: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
    """Chats ({"messages", "tools", "weight"}) as columns, with labels on the answers and their end tokens.

    Returns:
        input_ids, labels and weights (an empty list where all are 1) of each sequence; notes, the lines for the header that hold for each chat;
        and record, the index of each sequence's chat, where a chat became several sequences.

    Raises:
        UserError: the tokenizer has no chat template.
        ValueError: the template cannot show a chat.
    """
    template = chat_template(tokenizer)
    sequences: list[Sequence] = []
    records: list[int] = []
    notes: list[list[str]] = []
    for index, chat in enumerate(chats):
        parts, found = template.sequences(chat, options)
        sequences += parts
        records += [index] * len(parts)
        notes.append(found)
    batch: dict[str, list] = {"input_ids": [], "labels": [], "weights": []}
    owners = []
    for record, encoded in zip(records, _encoded(sequences, tokenizer), strict=True):
        for ids, answers in encoded:
            _append(batch, ids, answers)
            owners.append(record)
    batch["notes"] = notes
    return batch | {"record": owners} if len(owners) > len(chats) else batch


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The tokenizer's chat template, examined once.

    Raises:
        UserError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise UserError("--prompt_style chat: this tokenizer has no chat template; use --prompt_style alpaca")
    return _examined(tokenizer, str(tokenizer.chat_template), str(tokenizer.eos_token), len(tokenizer))


@functools.lru_cache(maxsize=4)
def _examined(tokenizer: PreTrainedTokenizerBase, template: str, eos: str, size: int) -> ChatTemplate:
    return ChatTemplate(tokenizer)


class ChatTemplate:
    """How a template writes chats, as far as it must be known to find the answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Render a chat or two."""
        self.tokenizer = tokenizer
        self.fits: dict[tuple[Shape, bool], tuple[Fit, list[str]]] = {}
        self.start_token = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
        self.ignores = False
        """The template writes the same with and without add_generation_prompt, and a header before an answer."""
        self.opening = ""
        """What it writes behind the prompt and before the text of an answer."""
        self.next_header = ""
        """The header of a next answer, where the template writes it behind the last one too, asked or not."""
        self.ends = _end_tokens(tokenizer)
        question = [{"role": "user", "content": "zqqz"}]
        self.parts = False
        """The template takes contents as lists of parts alone, as those of models that see pictures may."""
        self.parts = not self._shows_text(question) and self._shows_text(_as_parts(question))
        try:
            asked, unasked = self.prompt(question), self._render(question, False)
            chat = [*question, {"role": "assistant", "content": _MARK}]
            answered, continued = self._render(chat, False), self._render([*chat, *question], False)
        except ValueError:
            return  # a template for longer chats only
        if _MARK not in answered:
            return
        tail = answered.rpartition(_MARK)[2]
        if asked == unasked and not continued.startswith(answered.rstrip()):
            self.next_header = self._next_header(tail, continued.rpartition(_MARK)[2])
            tail = tail.removesuffix(self.next_header)
        tail = tail.rstrip()
        self.ends += [token.content for token in _added(tokenizer) if tail and tail.endswith(token.content)]
        if not tail:  # another special token at the end of an answer is the answer's own, and ends nothing
            self.ends = [token for token in self.ends if token == tokenizer.eos_token]
        header = answered[len(commonprefix([asked, answered])) : answered.find(_MARK)]
        self.ignores = asked == unasked and bool(header.strip())
        self.opening = "" if self.ignores else header

    def _next_header(self, tail: str, continued: str) -> str:
        """The end of `tail` that is no part of an answer: behind its first end token, else where another turn differs."""
        found = [tail.find(token) + len(token) for token in self.ends if token in tail]
        if not found:
            differs = _common(tail, continued)
            found = [tail.rfind("\n", 0, differs) + 1 or differs]
        return tail[min(found) :].lstrip()

    def prompt(self, messages: list[Turn], tools: list[dict] | None = None) -> str:
        """What a server sends for the next answer."""
        return self._render(messages, True, tools)

    def content(self, written: str) -> str:
        """The text of an answer as a model wrote it, special tokens and all; empty where it writes nothing around it."""
        if not self.opening.strip() or self.opening not in written:
            return ""
        end = self._end(written, 0)
        text = written.rpartition(self.opening)[2]
        for token in self.ends if end else ():
            text = text.rstrip().removesuffix(token)
        return text.strip()

    def _shows_text(self, question: list[Turn]) -> bool:
        with contextlib.suppress(ValueError):
            return "zqqz" in self._render(question, False)
        return False

    def _render(self, messages: list[Turn], ask: bool, tools: list[dict] | None = None) -> str:
        messages = _as_parts(messages) if self.parts else messages
        return render(self.tokenizer, messages, ask, tools=tools or None)

    # ---- a chat ----

    def sequences(self, chat: dict, options: EncodeOptions) -> tuple[list[Sequence], list[str]]:
        """The texts that a chat becomes, and what the header says of it.

        Raises:
            ValueError: the template cannot show it.
        """
        messages, tools = leading_as_context(_plain(chat["messages"], options.reasoning)), chat.get("tools") or None
        fit, notes = self._fit(_shape(messages), bool(tools))
        notes = [*notes, *unanswered(chat["messages"])]
        fitted = _fitted(messages, fit)
        if _NINE.search(str(self.tokenizer.chat_template)) and (numbered := _with_ids(fitted)) != fitted:
            fitted, notes = numbered, [*notes, NEW_IDS]
        weights = [weight_of(turn, f"turn {number}") for number, turn in enumerate(fitted, 1)]
        fitted = [{key: value for key, value in turn.items() if key != "weight"} for turn in fitted]
        row_weight = weight_of(chat, "the row")
        answers = _answers(fitted)
        learned = [index for index in answers if weights[index] * row_weight > 0]
        if not learned:
            return [Sequence(self._render(fitted[: answers[-1] + 1], False, tools))], notes
        pieces = [replace(self._piece(fitted, index, tools), weight=weights[index] * row_weight) for index in learned]
        notes = [*notes, *self._notes([fitted[index] for index in learned], pieces)]
        return _joined(pieces), notes

    def _notes(self, answers: list[Turn], pieces: list[Piece]) -> Iterator[str]:
        """Notes on the answers of a chat."""
        reasons = [
            (piece, reason) for turn, piece in zip(answers, pieces, strict=True) if (reason := reasoning_of(turn).strip())
        ]
        if reasons:
            yield REASONING if any(reason in piece.text[piece.start :] for piece, reason in reasons) else NO_REASONING
        if self.ignores:
            yield IGNORES
        if any(piece.end is None for piece in pieces):
            yield NO_END

    # ---- an answer ----

    def _piece(self, messages: list[Turn], index: int, tools: list[dict] | None) -> Piece:
        """The chat up to the answer at `index`.

        Raises:
            ValueError: the template writes another prompt once there is an answer, and the answer cannot be found.
        """
        asked = self.prompt(messages[:index], tools)
        text = self._render(messages[: index + 1], False, tools).removesuffix(self.next_header)
        if text.startswith(asked) and not self.ignores:
            return Piece(text, len(asked), self._end(text, len(asked)))
        turn = {key: _MARK for key in ("content", "reasoning_content") if key == "content" or messages[index].get(key)}
        shown = self._render([*messages[:index], {"role": "assistant", **turn}], False, tools)
        if self.ignores:
            start = _common(text, shown)
            return Piece(text, start, self._end(text, start))
        # the answer's own text may begin as the opened block does, but not the mark
        start = min(_common(asked, text), _common(asked, shown))
        opening = len(asked) - _common(asked, self._render(messages[:index], False, tools))
        if len(asked) - start <= opening:
            return Piece(text, start, self._end(text, start), opened=asked)
        header = asked[len(asked) - opening :]
        begins = _after(asked, text[: _common(text, shown)], messages[index - 1], header)
        if begins is None:
            raise ValueError(
                f"turn {index + 1}: the chat template rewrites the prompt of an answer; use --prompt_style alpaca"
            )
        text = asked + text[begins:]
        return Piece(text, len(asked), self._end(text, len(asked)), own_prompt=True)

    def _end(self, text: str, start: int) -> int | None:
        """Where the end token of the answer ends; blanks may follow it, and the start token of a next turn."""
        text = text.rstrip()
        while self.start_token and text.endswith(self.start_token):
            text = text[: -len(self.start_token)].rstrip()
        return len(text) if len(text) > start and text.endswith(tuple(self.ends)) else None

    # ---- what the template takes ----

    def _fit(self, shape: Shape, tools: bool) -> tuple[Fit, list[str]]:
        """The least change with which the template shows all turns of chats of this shape, and its notes."""
        if (shape, tools) not in self.fits:
            self.fits[shape, tools] = self._find_fit(shape, tools)
        return self.fits[shape, tools]

    def _find_fit(self, shape: Shape, tools: bool) -> tuple[Fit, list[str]]:
        first_error: ValueError | None = None
        for fit in _candidates(shape):
            try:
                notes = self._shows(shape, fit, tools)
            except ValueError as error:
                first_error = first_error or error
                continue
            if NO_REASONING in notes and "</think>" in str(self.tokenizer.chat_template):
                inline = replace(fit, inline_reasoning=True)
                if NO_REASONING not in self._shows(shape, inline, tools):
                    fit = inline
            return fit, [*fit.notes(), *(note for note in notes if note != NO_REASONING)]
        assert first_error is not None
        if "show" not in str(first_error) and any(role == "tool" or calls for role, _, _, calls in shape):
            raise ValueError(
                f"{first_error} (the chat has tool calls; does the template have a form for them?)"
            ) from first_error
        raise first_error

    def _shows(self, shape: Shape, fit: Fit, with_tools: bool) -> list[str]:
        """Notes on what the template leaves out of the answers of a chat of this shape.

        Raises:
            ValueError: it refuses such a chat, or leaves a turn out.
        """
        messages, tools = _fitted(leading_as_context(_sample(shape)), fit), _SAMPLE_TOOLS if with_tools else None
        answers = [index for index in _answers(messages) if messages[index].get("weight") != 0]
        asked = self.prompt(messages[: answers[-1]], tools)
        notes = [NO_TOOLS] if tools and tools[0]["function"]["name"] not in asked else []
        for number, turn in enumerate(messages[: answers[-1]], 1):
            if _plain_text(turn) not in asked and not turn.get("tool_calls"):
                raise ValueError(f"turn {number}: the chat template does not show {turn['role']} turns here")
        for index in answers:
            turn, text = messages[index], self._render(messages[: index + 1], False, tools)
            calls = [part for call in turn.get("tool_calls", []) for part in _parts(call)]
            if not all(part in text for part in calls):
                raise ValueError(
                    f"turn {index + 1}: the chat template does not show all tool_calls; no answer may lose them"
                )
            if _plain_text(turn) not in text:
                if not calls:
                    raise ValueError(f"turn {index + 1}: the chat template does not show the text of this answer")
                notes = [*notes, NO_TEXT] if NO_TEXT not in notes else notes
        number = next(n for n in range(len(shape) - 1, -1, -1) if shape[n][0] == "assistant")
        return [*notes, NO_REASONING] if shape[number][2] and f"zq{number}rqz" not in text else notes


def _common(one: Any, other: Any) -> int:
    """Length of what two texts or lists begin with."""
    return len(commonprefix([one, other]))


def _after(asked: str, text: str, last: Turn, header: str) -> int | None:
    """Where in `text` the prompt ends whose beginning the template rewrote: behind what both have at their ends.

    Where the template rewrites the last turn itself (Hermes' tool results), that is the header that the prompt ends with.
    """
    best, end = 0, None
    for position in range(len(text), -1, -1):
        size = len(commonprefix([asked[::-1], text[:position][::-1]]))
        if size > best:
            best, end = size, position
    if last["content"].strip() in asked[len(asked) - best :]:
        return end
    place = text.rfind(header, _common(asked, text)) if header.strip() else -1
    return place + len(header) if place >= 0 else None


def _joined(pieces: list[Piece]) -> list[Sequence]:
    """One sequence where the last rendering has all answers as they were rendered alone; else one for each."""
    last = pieces[-1]
    apart = len(pieces) > 1 and any(
        piece.own_prompt or (piece is not last and (piece.end is None or last.text[: piece.end] != piece.text[: piece.end]))
        for piece in pieces
    )
    if apart:
        return [Sequence(piece.text, [piece]) for piece in pieces]
    return [Sequence(last.text, pieces)]


def _added(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    return list(tokenizer.added_tokens_decoder.values())


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that may end an answer: eos, <|im_end|>, <end_of_turn>, ..."""
    others = {tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token}
    special = {token.content for token in _added(tokenizer) if token.special} - others
    return sorted(special | ({tokenizer.eos_token} if tokenizer.eos_token else set()))


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that the chat template ends answers and tool calls with; generation must stop at them."""
    template = chat_template(tokenizer)
    question: Turn = {"role": "user", "content": "1"}
    call: Turn = {"role": "assistant", "content": "", "tool_calls": [_SAMPLE_CALL]}
    found = []
    for answer in ({"role": "assistant", "content": "2"}, call):
        try:
            parts, _ = template.sequences({"messages": [question, answer]}, EncodeOptions(max_length=0, prompt_style="chat"))
        except ValueError:
            continue  # no tool calls
        ids, answers = next(_encoded(parts, tokenizer))[-1]
        found += [token for token in ids[answers[-1][1] - 1 : answers[-1][1]] if token not in found]
    return found


# ---- turns ----


def _plain(messages: list[Turn], reasoning: str) -> list[Turn]:
    """Turns that always have a text, up to the last answer; with --reasoning drop without reasoning."""
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
    turns = [turn | {"content": turn.get("content") or ""} for turn in messages[: last + 1]]
    if reasoning == "drop":
        turns = [{key: value for key, value in turn.items() if key != "reasoning_content"} for turn in turns]
        turns = [turn | {"content": _plain_text(turn)} if turn["role"] == "assistant" else turn for turn in turns]
    return turns


def unanswered(messages: list[Turn]) -> list[str]:
    """The note of a chat that does not end with an answer."""
    return [] if messages[-1]["role"] == "assistant" else [UNANSWERED]


def reasoning_of(turn: Turn) -> str:
    """The reasoning before an answer, in a field of its own or between <think> and </think>; empty where there is none."""
    inline = _THINK.match(turn["content"])
    return turn.get("reasoning_content") or (inline[1] if inline else "")


def weight_of(holder: dict, where: str) -> float:
    """The weight of a row or turn; 1 where it has none (ValueError: no number of 0 or more)."""
    return as_weight(holder.get("weight"), f"the weight of {where}")


def leading_as_context(messages: list[Turn]) -> list[Turn]:
    """An assistant turn that begins a chat answers nothing: weight 0, where an answer follows."""
    said = next((index for index, turn in enumerate(messages) if turn["role"] in ("user", "tool")), len(messages))
    if not any(turn["role"] == "assistant" for turn in messages[said:]):
        return messages
    leading = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in messages[:said]]
    return [*leading, *messages[said:]]


def _answers(messages: list[Turn]) -> list[int]:
    """Indices of the assistant turns that may be learned.

    Raises:
        ValueError: there is none.
    """
    answers = [index for index, turn in enumerate(messages) if index and turn["role"] == "assistant"]
    if not answers:
        raise ValueError("the chat has no answer to learn: no assistant turn that follows another turn")
    return answers


def _as_parts(messages: list[Turn]) -> list[Turn]:
    return [turn | {"content": [{"type": "text", "text": turn["content"]}] if turn["content"] else []} for turn in messages]


def _shape(messages: list[Turn]) -> Shape:
    return tuple(
        (turn["role"], bool(turn["content"]), bool(turn.get("reasoning_content")), len(turn.get("tool_calls") or []))
        for turn in messages
    )


_SAMPLE_CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "zqfqz", "arguments": {"zqkqz": "zqvqz"}}}
_SAMPLE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "zqtoolqz",
            "description": "zqdqz",
            "parameters": {"type": "object", "properties": {"zqkqz": {"type": "string", "description": "zq"}}},
        },
    }
]


def _sample(shape: Shape) -> list[Turn]:
    """A chat of this shape whose parts can be recognized."""
    turns: list[Turn] = []
    for number, (role, text, reasoning, calls) in enumerate(shape):
        turn: Turn = {"role": role, "content": f"zq{number}cqz" if text else ""}
        if reasoning:
            turn["reasoning_content"] = f"zq{number}rqz"
        if calls:
            names = [f"zq{number}f{call}qz" for call in range(calls)]
            turn["tool_calls"] = [
                _SAMPLE_CALL | {"function": {"name": name, "arguments": {f"{name}k": f"{name}v"}}} for name in names
            ]
        if role == "tool":
            turn |= {"tool_call_id": "a1b2c3d4e", "name": "zqfqz"}
        turns.append(turn)
    return turns


def _plain_text(turn: Turn) -> str:
    """A turn's text without reasoning in it."""
    return _THINK.sub("", turn["content"], count=1) if _THINK.match(turn["content"]) else turn["content"]


def _parts(call: dict) -> list[str]:
    """What a rendering must show of a sample's tool call."""
    name = call["function"]["name"]
    return [f"{name}k", f"{name}v"]


def _candidates(shape: Shape) -> list[Fit]:
    """Changes that could matter to chats of this shape, the fewest first."""
    roles = [role for role, *_ in shape]
    spoken = [role for role in roles if role != "system"]
    later = "system" in list(itertools.dropwhile(lambda role: role == "system", roles))
    systems = ["keep", *(["later"] if later and roles[0] == "system" else []), *(["all"] if "system" in roles else [])]
    leads = [False, True] if spoken[:1] == ["assistant"] else [False]
    joins = (
        [False, True] if any(a == b != "tool" for a, b in itertools.pairwise(spoken)) or "system" in roles[1:] else [False]
    )
    texts = [False, True] if any(calls for *_, calls in shape) else [False]
    fits = (Fit(*values) for values in itertools.product(systems, leads, joins, texts))
    return sorted(fits, key=Fit.changes)


def _fitted(messages: list[Turn], fit: Fit) -> list[Turn]:
    turns = messages
    if fit.system != "keep":
        turns = _without_system(turns, fit.system == "later")
    first = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), 0)
    if fit.lead and turns[first]["role"] == "assistant":
        turns = [*turns[:first], {"role": "user", "content": ""}, *turns[first:]]
    if fit.join:
        turns = joined_roles(turns)
    if fit.inline_reasoning:
        turns = [_with_inline_reasoning(turn) if turn.get("reasoning_content") else turn for turn in turns]
    return [_with_arguments(turn, fit.json_arguments) if turn.get("tool_calls") else turn for turn in turns]


def _with_inline_reasoning(turn: Turn) -> Turn:
    text = f"<think>\n{turn['reasoning_content'].strip()}\n</think>\n\n{turn['content']}"
    return {key: value for key, value in turn.items() if key != "reasoning_content"} | {"content": text}


def _without_system(messages: list[Turn], later_only: bool) -> list[Turn]:
    """System texts before the text of the next user turn; with none before an answer, behind the last one or alone."""
    turns: list[Turn] = []
    waiting: list[str] = []
    leading = later_only
    for turn in messages:
        leading = leading and turn["role"] == "system"
        if turn["role"] == "system" and not leading:
            waiting.append(turn["content"])
            continue
        if waiting and turn["role"] == "user":
            turn = turn | {"content": "\n\n".join([*waiting, turn["content"]])}
            waiting = []
        elif waiting and turn["role"] == "assistant":
            if turns and turns[-1]["role"] == "user":
                turns[-1] = turns[-1] | {"content": "\n\n".join([turns[-1]["content"], *waiting])}
            else:
                turns.append({"role": "user", "content": "\n\n".join(waiting)})
            waiting = []
        turns.append(turn)
    return turns


def joined_roles(messages: list[Turn]) -> list[Turn]:
    """Neighbours of one role in one turn.

    Raises:
        ValueError: they have different weights.
    """
    turns: list[Turn] = []
    for number, turn in enumerate(messages, 1):
        before = turns[-1] if turns else {"role": None}
        if turn["role"] != before["role"] or turn["role"] == "tool":
            turns.append(turn)
            continue
        if weight_of(turn, f"turn {number}") != weight_of(before, f"turn {number - 1}"):
            raise ValueError(
                f"turn {number}: it has the role of the turn before and another weight, so they cannot be joined"
            )
        turns[-1] = before | turn
        for name in ("content", "reasoning_content"):
            texts = [text for text in (before.get(name), turn.get(name)) if text]
            turns[-1] |= {name: "\n\n".join(texts)} if name == "content" or texts else {}
        calls = [*(before.get("tool_calls") or []), *(turn.get("tool_calls") or [])]
        turns[-1] |= {"tool_calls": calls} if calls else {}
    return turns


def _with_ids(messages: list[Turn]) -> list[Turn]:
    """Calls whose ids have not nine letters and digits numbered, and their results with the same ids, in order."""
    turns: list[Turn] = []
    waiting: list[tuple[str | None, str]] = []
    count = 0
    for turn in messages:
        calls = []
        for call in turn.get("tool_calls") or []:
            old = call.get("id")
            count += 1
            new = old if isinstance(old, str) and len(old) == 9 and old.isalnum() else f"{count:09d}"
            calls.append(call | {"id": new})
            waiting.append((old, new))
        if calls:
            turn = turn | {"tool_calls": calls}
        elif turn["role"] == "tool" and waiting:
            matches = [pair for pair in waiting if pair[0] is not None and pair[0] == turn.get("tool_call_id")]
            pair = matches[0] if matches else waiting[0]
            waiting.remove(pair)
            turn = turn | {"tool_call_id": pair[1]}
        turns.append(turn)
    return turns


def _with_arguments(turn: Turn, as_text: bool) -> Turn:
    """The turn with the arguments of its tool calls as the template takes them."""
    calls = []
    for call in turn["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # what is no JSON stays text
                arguments = json.loads(arguments or "{}")
        calls.append({"type": "function", **call, "function": function | {"arguments": arguments}})
    return turn | {"tool_calls": calls}


# ---- tokens ----

Encoded = tuple[list[int], list[tuple[int, int, float]]]
"""The ids of a sequence, and of each of its answers (first token, token behind the last, weight)."""


def _append(batch: dict[str, list], ids: list[int], answers: list[tuple[int, int, float]]) -> None:
    """Add a sequence to the columns."""
    labels = [IGNORE] * len(ids)
    for first, last, _ in answers:
        labels[first:last] = ids[first:last]
    weights = []
    if any(weight != 1 for *_, weight in answers):
        weights = [1.0] * len(ids)
        for first, last, weight in answers:
            weights[first:last] = [weight] * (last - first)
    batch["input_ids"].append(ids)
    batch["labels"].append(labels)
    batch["weights"].append(weights)


def _encoded(sequences: list[Sequence], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Encoded]]:
    """Each sequence encoded; as one for each answer where the tokens of a prompt are not those that a server sends."""
    if not tokenizer.is_fast:
        yield from ([_slow(sequence, tokenizer)] for sequence in sequences)
        return
    backend = _backend(tokenizer, len(tokenizer))
    added = set(tokenizer.added_tokens_decoder)
    encodings = backend.encode_batch([sequence.text for sequence in sequences], add_special_tokens=False)
    pending, tails = [], dict[str, list[int]]()
    for sequence, encoding in zip(sequences, encodings, strict=True):
        ids, boundaries = encoding.ids, []
        for piece in sequence.pieces:
            first = _token_at(encoding, piece.start, len(sequence.text))
            begin = next((index for index in range(first - 1, -1, -1) if ids[index] in added), 0)
            tail = sequence.text[encoding.token_to_chars(begin)[0] if begin else 0 : piece.start]
            tails[tail] = []
            boundaries.append((first, begin, tail))
        pending.append((encoding, ids, boundaries))
    for tail, encoding in zip(tails, backend.encode_batch_fast(list(tails), add_special_tokens=False), strict=True):
        tails[tail] = encoding.ids
    for sequence, (encoding, ids, boundaries) in zip(sequences, pending, strict=True):
        exact = all(ids[begin:first] == tails[tail] for first, begin, tail in boundaries)
        if exact:
            answers = [
                (first, _token_behind(encoding, piece.end, len(ids)), piece.weight)
                for piece, (first, _, _) in zip(sequence.pieces, boundaries, strict=True)
            ]
            yield [_ended(ids, answers, sequence.pieces[-1:], tokenizer)]
        else:
            yield [_with_prompt_of_server(piece, backend, tokenizer) for piece in sequence.pieces]


def _ended(
    ids: list[int], answers: list[tuple[int, int, float]], last: list[Piece], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Cut behind the last answer, or with eos behind it where the template ends it with no token."""
    if not last:
        return ids, answers
    first, end, weight = answers[-1]
    if last[0].end is not None:
        return ids[:end], answers
    return [*ids, eos_of(tokenizer)], [*answers[:-1], (first, len(ids) + 1, weight)]


@functools.lru_cache(maxsize=2)
def _backend(tokenizer: PreTrainedTokenizerBase, size: int) -> Tokenizer:
    """A copy whose offsets are whole: post-processors of byte-level tokenizers cut blanks off them."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None  # adds special tokens, which is not asked for, and changes nothing else
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_at(encoding: Any, start: int, size: int) -> int:
    """The first token that has a part of the text from `start` on."""
    token = encoding.char_to_token(start) if start < size else None
    if token is None:  # a character that the tokenizer drops
        offsets = encoding.offsets
        token = next((index for index, (_, end) in enumerate(offsets) if end > start), len(offsets))
    while token and encoding.token_to_chars(token - 1) == (start, start):
        token -= 1
    return token


def _token_behind(encoding: Any, end: int | None, size: int) -> int:
    """The token behind the one that ends at `end`, an end token of one piece."""
    if end is None:
        return size
    token = encoding.char_to_token(end - 1)
    return size if token is None else token + 1


def _with_prompt_of_server(piece: Piece, backend: Tokenizer, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The prompt encoded by itself, and the tokens of the answer behind it; a token that has parts of both is cut."""
    encoding = backend.encode(piece.text, add_special_tokens=False)
    ids = encoding.ids
    first = _token_at(encoding, piece.start, len(piece.text))
    last = _token_behind(encoding, piece.end, len(ids))
    prompt = backend.encode(piece.text[: piece.start], add_special_tokens=False).ids
    if piece.opened and backend.encode(piece.opened, add_special_tokens=False).ids[: len(prompt)] != prompt:
        # the block begins inside a token: the prompt ends before it, as that of the server does
        return _ended(ids, [(first, last, piece.weight)], [piece], tokenizer)
    rest: list[int] = []
    begin, stop = encoding.token_to_chars(first) or (piece.start, piece.start)
    if begin < piece.start:
        # counted from the end: a token may begin with a mark that is in no text (the "▁" of SentencePiece)
        token, tail = encoding.tokens[first], piece.text[piece.start : stop]
        size = len(tail) if token.endswith(tail.replace(" ", "▁")) else len(tail.encode())  # in characters, or in bytes
        rest, first = [part.id for part in backend.model.tokenize(token[len(token) - size :])], first + 1
    answer = (len(prompt), len(prompt) + len(rest) + last - first, piece.weight)
    return _ended([*prompt, *rest, *ids[first:]], [answer], [piece], tokenizer)


def _slow(sequence: Sequence, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The same without offsets: an answer begins where the ids of the text before it and of the whole text part.

    Raises:
        UserError: the ids of the text up to the end of an answer are not those that the whole text begins with.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    ids, answers = ids_of(sequence.text), []
    for piece in sequence.pieces:
        first = _common(ids_of(sequence.text[: piece.start]), ids)
        ended = ids if piece.end is None else ids_of(sequence.text[: piece.end])
        if ids[: len(ended)] != ended:
            raise UserError(
                f"--prompt_style chat: {tokenizer.name_or_path} has a tokenizer without offsets, which does not show where an "
                "answer ends; use --prompt_style alpaca, or a fast tokenizer (tokenizer.json)"
            )
        answers.append((first, len(ended), piece.weight))
    return _ended(ids, answers, sequence.pieces[-1:], tokenizer)
