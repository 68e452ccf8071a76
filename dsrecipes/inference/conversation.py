"""A conversation with one model: what was said, what of it the model still sees, and its next answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from dsrecipes.data.chat_template import chat_template
from dsrecipes.errors import UserError
from dsrecipes.inference.answers import generation_settings, positions
from dsrecipes.inference.device import memory_errors
from dsrecipes.inference.finished import FinishedRun
from dsrecipes.inference.prompting import BAD_ROW, PromptField, ask
from dsrecipes.model.router import without_router_logits

Json = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What a person said, and what the model answered: its text, and the ids as the model wrote them."""

    said: str
    answer: str
    ids: list[int]


@dataclass
class Conversation:
    """Turns with one model.

    A recipe that takes messages gets the turns as a row of them, so that the model sees what training would have made of
    it. For another recipe the model sees the ids of the earlier turns, each with its end token, and then those of the
    new prompt, the way packed examples follow one another. A recipe that continues text starts over at each turn.
    """

    run: FinishedRun
    model: PreTrainedModel
    asking: PromptField
    adapter: bool = True
    """False switches the adapter of a LoRA run off: the untuned model, without a second copy."""
    system: str | None = None
    settings: Json = field(default_factory=dict)
    keep_cut: bool = False
    """Ctrl-C ends an answer, which is kept so far; otherwise it is raised."""
    notice: Callable[[str], None] = lambda text: None
    """Told when a turn no longer fits into the model's positions."""
    stopped: Callable[[], bool] = lambda: False
    """Asked at each token: the answer ends there, and is kept so far."""
    turns: list[Turn] = field(default_factory=list)
    first: int = 0
    """The oldest turn that the model still sees."""
    _seen: list[int] = field(default_factory=list)

    def reset(self) -> None:
        """Forget all turns; what the system was told stays."""
        self.turns, self.first, self._seen = [], 0, []

    def say(self, text: str, write: Callable[[str], None] = lambda text: None) -> str:
        """The answer to `text`; `write` is given its pieces as they come.

        Raises:
            UserError: the recipe cannot take this text, or it has no room in the model's positions.
        """
        if self.asking.continues:
            self.first = len(self.turns)
        return self._answer(text, lambda: self._prompt(text), write)

    def more(self, write: Callable[[str], None] = lambda text: None) -> str:
        """Go on with the text of the last turn, for a recipe that continues text.

        Raises:
            UserError: the recipe answers instead, or there is no text yet.
        """
        if not self.asking.continues or not self._seen:
            raise UserError("/more goes on with a text; there is none to go on with")
        most = generation_settings(self.run, self.model, **self.settings).max_new_tokens
        room = positions(self.model)
        if room and len(self._seen) + most > room > most:
            self.notice("the beginning of the text no longer fits and is left out")
            self._seen = self._seen[-(room - most) :]
        return self._answer("", lambda: list(self._seen), write)

    @memory_errors("/reset", "a smaller --max_new_tokens")
    def _answer(self, said: str, prompt: Callable[[], list[int]], write: Callable[[str], None]) -> str:
        settings = generation_settings(self.run, self.model, **self.settings)
        room, ids = positions(self.model), prompt()
        while room and len(ids) + settings.max_new_tokens > room and self.first < len(self.turns):
            self.first += 1
            self.notice("the oldest turn no longer fits and is left out")
            ids = prompt()
        if room and len(ids) >= room:
            raise UserError(f"this takes {len(ids)} tokens, and the model has {room} positions: say it in fewer words")
        if room:
            settings.max_new_tokens = min(settings.max_new_tokens, room - len(ids))
        stream = _Stream(self.run.tokenizer, write, strip=not self.asking.continues)
        off = contextlib.nullcontext() if self.adapter else self.model.disable_adapter()
        row = torch.tensor([ids], device=self.model.device)
        try:
            with torch.no_grad(), off:
                self.model.generate(
                    input_ids=row, attention_mask=torch.ones_like(row), generation_config=settings, streamer=stream,
                    stopping_criteria=[lambda ids, scores: torch.full((1,), self.stopped(), device=ids.device)],
                    **without_router_logits(self.model),
                )  # fmt: skip
        except KeyboardInterrupt:
            if not self.keep_cut:
                raise
            stream.end()
        except ValueError as error:  # a setting that does not go with streaming, such as num_beams
            raise UserError(f"transformers refuses: {str(error).splitlines()[0]}") from error
        answer = self.run.tokenizer.decode(stream.ids, skip_special_tokens=True)
        answer = answer if self.asking.continues else answer.strip()
        self.turns.append(Turn(said, answer, stream.ids))
        self._seen = ids + (stream.ids[:-1] if self._ended(stream.ids) else stream.ids)
        return answer

    def _ended(self, ids: list[int]) -> bool:
        return ids[-1:] == [self.run.tokenizer.eos_token_id]

    def _prompt(self, text: str) -> list[int]:
        turns = self.turns[self.first :]
        try:
            if self.asking.field == "messages":
                row = self.asking.row(text, self.system)
                said = [pair for turn in turns if turn.answer for pair in _messages(turn, self._content(turn))]
                return ask(self.run, {"messages": [*row["messages"][:-1], *said, row["messages"][-1]]}, self.asking).ids
            ids: list[int] = []
            for turn in turns:
                ids += self._alone(turn.said, bool(ids)) + turn.ids
                ids += [] if self._ended(turn.ids) else [self.run.tokenizer.eos_token_id]
            return ids + self._alone(text, bool(ids))
        except BAD_ROW as error:
            raise UserError(str(error)) from error

    def _content(self, turn: Turn) -> str:
        """An answer's text without what the chat template writes around it, such as the name of a channel."""
        if self.run.options.prompt_style != "chat":
            return turn.answer
        return chat_template(self.run.tokenizer).content(self.run.tokenizer.decode(turn.ids)) or turn.answer

    def _alone(self, text: str, later: bool) -> list[int]:
        """One turn's prompt; the token that begins a sequence stands before the first alone."""
        ids = ask(self.run, self.asking.row(text, self.system), self.asking).ids
        start = self.run.tokenizer.bos_token_id
        return ids[1:] if later and start is not None and ids[:1] == [start] else ids

    def messages(self) -> list[Json]:
        """All that was said, as chat messages."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + [message for turn in self.turns for message in _messages(turn, turn.answer)]


def _messages(turn: Turn, answer: str) -> list[Json]:
    return [{"role": "user", "content": turn.said}, {"role": "assistant", "content": answer}]


class _Stream(TextStreamer):
    """transformers' streamer, writing where it is told, that keeps the ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], strip: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.strip = write, strip
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token by token."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Whole words; an answer does not begin with blanks."""
        text = text.lstrip() if self.strip else text
        if text:
            self.strip = False
            self.write(text)
