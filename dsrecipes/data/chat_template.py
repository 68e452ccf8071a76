"""What does a chat template write around an answer, and which chats does it accept?

A template is a program without a description, so the answers come from rendering small chats.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsrecipes.data.chat_fit import Fit, answers_of, apply_fit, as_parts, candidates, leading_as_context, text_of
from dsrecipes.data.chat_render import render
from dsrecipes.data.chat_sample import SAMPLE_TOOLS, Shape, call_parts, sample_chat, sample_reasoning
from dsrecipes.data.turns import Turn
from dsrecipes.errors import UserError, coded

NO_REASONING = coded("DSR143", "the chat template does not show the reasoning of answers, which is not trained on")
NO_TOOLS = coded("DSR144", "the chat template does not show the definitions of tools")
NO_TEXT = coded(
    "DSR145", "the chat template does not show the text of an answer next to its tool calls, which is not trained on"
)
MARK = "\ue000"
"""Stands for the text of an answer: a character of the private use area, with which no template and no user text begins."""
_WORD = "zqqz"
"""A text that no template writes."""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the tokenizer's chat template, examined once.

    Raises:
        UserError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise UserError("DSR140", "--prompt_style chat: this tokenizer has no chat template; use --prompt_style alpaca")
    return _examined(tokenizer, str(tokenizer.chat_template), str(tokenizer.eos_token), len(tokenizer))


@functools.lru_cache(maxsize=4)
def _examined(tokenizer: PreTrainedTokenizerBase, template: str, eos: str, size: int) -> ChatTemplate:
    """Examine a template; the arguments after the first are only cache keys, because a tokenizer can be changed."""
    return ChatTemplate(tokenizer)


class ChatTemplate:
    """How a template writes chats, as far as finding the answers requires."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Render a few chats."""
        self.tokenizer = tokenizer
        self._fits: dict[tuple[Shape, bool], tuple[Fit, list[str]]] = {}
        self.start_token = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
        self.ignores = False
        """The template writes the same with and without add_generation_prompt, and a header before an answer."""
        self.opening = ""
        """What it writes between the prompt and the text of an answer."""
        self.next_header = ""
        """The header of a next answer, where the template writes it after the last answer even without add_generation_prompt."""
        self.ends = _end_tokens(tokenizer)
        question = [{"role": "user", "content": _WORD}]
        # rendered with and without, because no field of a tokenizer says so; False must be set for the first rendering
        self.takes_parts = False
        """The template accepts contents only as lists of parts, as those of vision models may."""
        self.takes_parts = not self._shows_text(question) and self._shows_text(as_parts(question))
        with contextlib.suppress(ValueError):  # a template for longer chats only
            self._examine(question)

    def _examine(self, question: list[Turn]) -> None:
        """Find what the template writes around an answer.

        Raises:
            ValueError: the template refuses short chats.
        """
        prompted, unprompted = self.prompt(question), self.render(question, False)
        chat = [*question, {"role": "assistant", "content": MARK}]
        answered, continued = self.render(chat, False), self.render([*chat, *question], False)
        if MARK not in answered:
            return
        tail = answered.rpartition(MARK)[2]
        # A template that always writes the header of an answer may write one after the last answer too. It is recognized by its
        # absence where a user turn follows.
        if prompted == unprompted and not continued.startswith(answered.rstrip()):
            self.next_header = self._find_next_header(tail, continued.rpartition(MARK)[2])
            tail = tail.removesuffix(self.next_header)
        # the line break that many templates write after an end token is no part of the answer
        tail = tail.rstrip()
        self.ends += [token.content for token in _added(self.tokenizer) if tail and tail.endswith(token.content)]
        if not tail:  # then another special token at the end of an answer is a part of the answer
            self.ends = [token for token in self.ends if token == self.tokenizer.eos_token]
        header = answered[common_length(prompted, answered) : answered.find(MARK)]
        self.ignores = prompted == unprompted and bool(header.strip())
        self.opening = "" if self.ignores else header

    def _find_next_header(self, tail: str, continued: str) -> str:
        """Return the end of `tail` that belongs to no answer: after its first end token, else where another turn differs."""
        ends = [tail.find(token) + len(token) for token in self.ends if token in tail]
        if ends:
            return tail[min(ends) :].lstrip()
        differs = common_length(tail, continued)
        start = tail.rfind("\n", 0, differs) + 1 or differs
        return tail[start:].lstrip()

    def prompt(self, messages: list[Turn], tools: list[dict] | None = None) -> str:
        """Render what a server sends for the next answer."""
        return self.render(messages, True, tools)

    def content(self, written: str) -> str:
        """Return the text of an answer as a model wrote it, with special tokens; '' where it writes nothing around it."""
        if not self.opening.strip() or self.opening not in written:
            return ""
        end = self.end_of_answer(written, 0)
        text = written.rpartition(self.opening)[2]
        for token in self.ends if end else ():
            text = text.rstrip().removesuffix(token)
        return text.strip()

    def _shows_text(self, question: list[Turn]) -> bool:
        with contextlib.suppress(ValueError):
            return _WORD in self.render(question, False)
        return False

    def render(self, messages: list[Turn], generation: bool, tools: list[dict] | None = None) -> str:
        """Render turns; `generation` adds the generation prompt, with which an answer begins."""
        messages = as_parts(messages) if self.takes_parts else messages
        return render(self.tokenizer, messages, generation, tools=tools or None)

    def end_of_answer(self, text: str, start: int) -> int | None:
        """Return where the end token of the answer that begins at `start` ends, or None where the template writes none.

        Blanks and the start token of a next turn may follow it.
        """
        text = text.rstrip()
        while self.start_token and text.endswith(self.start_token):
            text = text[: -len(self.start_token)].rstrip()
        return len(text) if len(text) > start and text.endswith(tuple(self.ends)) else None

    # ---- what the template accepts ----

    def fit(self, shape: Shape, tools: bool) -> tuple[Fit, list[str]]:
        """Return the smallest change with which the template shows all turns of chats of this shape, and its notes."""
        if (shape, tools) not in self._fits:
            self._fits[shape, tools] = self._find_fit(shape, tools)
        return self._fits[shape, tools]

    def _find_fit(self, shape: Shape, tools: bool) -> tuple[Fit, list[str]]:
        # the error of the smallest change is reported: it is about the user's chat, those of later ones about changed chats
        first_error: ValueError | None = None
        for fit in candidates(shape):
            try:
                notes = self._losses(shape, fit, tools)
            except ValueError as error:
                first_error = first_error or error
                continue
            # only for templates that know <think>: elsewhere the tags would be plain text that the model learns to write
            if NO_REASONING in notes and "</think>" in str(self.tokenizer.chat_template):
                inline = replace(fit, inline_reasoning=True)
                if NO_REASONING not in self._losses(shape, inline, tools):
                    fit = inline
            return fit, [*fit.notes(), *(note for note in notes if note != NO_REASONING)]
        assert first_error is not None
        if "show" not in str(first_error) and any(role == "tool" or calls for role, _, _, calls in shape):
            raise ValueError(
                f"{first_error} (the chat has tool calls; does the template have a form for them?)"
            ) from first_error
        raise first_error

    def _losses(self, shape: Shape, fit: Fit, with_tools: bool) -> list[str]:
        """List what the template leaves out of the answers of a chat of this shape, as notes for the header.

        Raises:
            ValueError: it refuses such a chat, or leaves a turn out.
        """
        messages = apply_fit(leading_as_context(sample_chat(shape)), fit)
        tools = SAMPLE_TOOLS if with_tools else None
        answers = [index for index in answers_of(messages) if messages[index].get("weight") != 0]
        prompt = self.prompt(messages[: answers[-1]], tools)
        notes = [NO_TOOLS] if tools and tools[0]["function"]["name"] not in prompt else []
        for number, turn in enumerate(messages[: answers[-1]], 1):
            if text_of(turn) not in prompt and not turn.get("tool_calls"):
                raise ValueError(f"turn {number}: the chat template does not show {turn['role']} turns here")
        text = ""
        for index in answers:
            text = self.render(messages[: index + 1], False, tools)
            if not _shows_answer(messages[index], text, f"turn {index + 1}") and NO_TEXT not in notes:
                notes = [*notes, NO_TEXT]
        # the last answer decides, because many templates leave out the reasoning of earlier ones on purpose
        last = max(number for number, turn in enumerate(shape) if turn[0] == "assistant")
        return [*notes, NO_REASONING] if shape[last][2] and sample_reasoning(last) not in text else notes


def _shows_answer(turn: Turn, text: str, name: str) -> bool:
    """Return whether a rendering shows the text of an answer (ValueError: not all tool calls, or nothing of it)."""
    calls = [part for call in turn.get("tool_calls", []) for part in call_parts(call)]
    if not all(part in text for part in calls):
        raise ValueError(f"{name}: the chat template does not show all tool_calls; no answer may lose them")
    if text_of(turn) in text:
        return True
    if not calls:
        raise ValueError(f"{name}: the chat template does not show the text of this answer")
    return False


def common_length(one: Any, other: Any) -> int:
    """Return the length of the common prefix of two texts or lists."""
    return len(commonprefix([one, other]))


def _added(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    return list(tokenizer.added_tokens_decoder.values())


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the special tokens that may end an answer: eos, <|im_end|>, <end_of_turn>, ..."""
    # a token that begins or pads texts is special too, but ends no answer
    others = {tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token}
    special = {token.content for token in _added(tokenizer) if token.special} - others
    return sorted(special | ({tokenizer.eos_token} if tokenizer.eos_token else set()))
