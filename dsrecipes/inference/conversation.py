"""What does a model see of a conversation, and what is its next answer?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from dsrecipes.data.chat_template import chat_template
from dsrecipes.data.records import BAD_ROW
from dsrecipes.errors import UserError
from dsrecipes.inference.answers import generation_settings, positions
from dsrecipes.inference.device import memory_errors
from dsrecipes.inference.finished import FinishedRun
from dsrecipes.inference.prompting import PromptField, prompt_of
from dsrecipes.model.router import without_router_logits

Json = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What a person said and the model answered."""

    said: str
    answer: str
    ids: list[int]
    """The answer's tokens as the model wrote them, which its text need not encode to."""


@dataclass
class Conversation:
    """Turns with one model.

    A recipe that takes messages gets the turns as a row of them, so that the model sees what training would have made of
    it. For another recipe the model sees the ids of the earlier turns, each with its end token, and then those of the
    new prompt, as packed examples follow one another. A recipe that continues text starts over at each turn.
    """

    run: FinishedRun
    model: Any
    """A causal model; `Any`, because only a LoRA model has disable_adapter."""
    prompt_field: PromptField
    adapter: bool = True
    """False switches the adapter of a LoRA run off: the untuned model, without a second copy."""
    system: str | None = None
    settings: Json = field(default_factory=dict)
    keep_cut: bool = False
    """Ctrl-C ends an answer and keeps what was generated; otherwise KeyboardInterrupt is raised."""
    notice: Callable[[str], None] = lambda text: None
    """Called with a message when a turn no longer fits into the model's positions."""
    stopped: Callable[[], bool] = lambda: False
    """Called at each token; True ends the answer and keeps what was generated."""
    turns: list[Turn] = field(default_factory=list)
    first: int = 0
    """The oldest turn that the model still sees."""
    _seen: list[int] = field(default_factory=list)
    """The last prompt and answer, which `more` continues."""

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self.turns, self.first, self._seen = [], 0, []

    def say(self, text: str, write: Callable[[str], None] = lambda text: None) -> str:
        """Answer `text`; `write` gets the answer's pieces as they are generated.

        Raises:
            UserError: the recipe cannot take this text, or it does not fit into the model's positions.
        """
        return self._answer(text, lambda: self._prompt(text), write)

    def more(self, write: Callable[[str], None] = lambda text: None) -> str:
        """Continue the text of the last turn, for a recipe that continues text.

        Raises:
            UserError: the recipe answers instead, or there is no text yet.
        """
        if not self.prompt_field.continues or not self._seen:
            raise UserError("DSR449", "/more continues a text; there is none to continue")
        new = generation_settings(self.run, self.model, **self.settings).max_new_tokens
        limit = positions(self.model)
        if limit and len(self._seen) + new > limit > new:
            self.notice("the beginning of the text no longer fits and is left out")
            self._seen = self._seen[-(limit - new) :]
        return self._answer("", lambda: list(self._seen), write)

    @memory_errors("/reset", "a smaller --max_new_tokens")
    def _answer(self, said: str, prompt: Callable[[], list[int]], write: Callable[[str], None]) -> str:
        settings = generation_settings(self.run, self.model, **self.settings)
        continues = self.prompt_field.continues
        if continues:
            # The prompt holds no whole turns that could be left out.
            self.first = len(self.turns)
        ids = self._fitting_prompt(prompt, settings)
        stream = _Stream(self.run.tokenizer, write, strip=not continues)
        try:
            self._generate(ids, settings, stream)
        except KeyboardInterrupt:
            if not self.keep_cut:
                raise
            stream.end()
        except ValueError as error:
            # Some settings, such as num_beams, are refused only when the answer is streamed.
            raise UserError("DSR434", f"transformers refuses: {str(error).splitlines()[0]}") from error
        answer = str(self.run.tokenizer.decode(stream.ids, skip_special_tokens=True))
        answer = answer if continues else answer.strip()
        self.turns.append(Turn(said, answer, stream.ids))
        # `more` continues the text, so the end token is left out of what it continues.
        self._seen = ids + (stream.ids[:-1] if self._ended(stream.ids) else stream.ids)
        return answer

    def _fitting_prompt(self, prompt: Callable[[], list[int]], settings: GenerationConfig) -> list[int]:
        """The prompt without the oldest turns that do not fit; max_new_tokens is lowered to what is left."""
        limit, ids = positions(self.model), prompt()
        while limit and len(ids) + settings.max_new_tokens > limit and self.first < len(self.turns):
            # Whole turns are dropped, so that the prompt never begins in the middle of an answer.
            self.first += 1
            self.notice("the oldest turn no longer fits and is left out")
            ids = prompt()
        if limit and len(ids) >= limit:
            raise UserError(
                "DSR432", f"this takes {len(ids)} tokens, and the model has {limit} positions: say it in fewer words"
            )
        if limit:
            # A shorter answer is better than a refusal while any position is left.
            settings.max_new_tokens = min(settings.max_new_tokens, limit - len(ids))
        return ids

    def _generate(self, ids: list[int], settings: GenerationConfig, stream: _Stream) -> None:
        row = torch.tensor([ids], device=self.model.device)
        # Switching the adapter off gives the base model without a second copy in memory.
        untuned = contextlib.nullcontext() if self.adapter else self.model.disable_adapter()
        with torch.no_grad(), untuned:
            self.model.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                generation_config=settings,
                streamer=stream,
                stopping_criteria=[lambda ids, scores: torch.full((1,), self.stopped(), device=ids.device)],
                **without_router_logits(self.model),
            )

    def _ended(self, ids: list[int]) -> bool:
        return ids[-1:] == [self.run.tokenizer.eos_token_id]

    def _prompt(self, text: str) -> list[int]:
        turns = self.turns[self.first :]
        try:
            if self.prompt_field.field == "messages":
                *opening, question = self.prompt_field.row(text, self.system)["messages"]
                earlier = [message for turn in turns if turn.answer for message in _messages(turn, self._content(turn))]
                return prompt_of(self.run, {"messages": [*opening, *earlier, question]}).ids
            ids: list[int] = []
            end = self.run.tokenizer.eos_token_id
            for turn in turns:
                ids += self._prompt_of_turn(turn.said, bool(ids)) + turn.ids
                # An answer that was cut off lacks the end token that separates examples in training.
                ids += [] if end is None or self._ended(turn.ids) else [end]
            return ids + self._prompt_of_turn(text, bool(ids))
        except BAD_ROW as error:
            raise UserError("DSR454", str(error)) from error

    def _content(self, turn: Turn) -> str:
        """An answer's text without what the chat template writes around it, such as the name of a channel."""
        if self.run.options.prompt_style != "chat":
            return turn.answer
        return chat_template(self.run.tokenizer).content(str(self.run.tokenizer.decode(turn.ids))) or turn.answer

    def _prompt_of_turn(self, text: str, later: bool) -> list[int]:
        """One turn's prompt; only the first has the token that begins a sequence."""
        ids = prompt_of(self.run, self.prompt_field.row(text, self.system)).ids
        start = self.run.tokenizer.bos_token_id
        return ids[1:] if later and start is not None and ids[:1] == [start] else ids

    def messages(self) -> list[Json]:
        """The whole conversation as chat messages."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return opening + [message for turn in self.turns for message in _messages(turn, turn.answer)]


def _messages(turn: Turn, answer: str) -> list[Json]:
    return [{"role": "user", "content": turn.said}, {"role": "assistant", "content": answer}]


class _Stream(TextStreamer):
    """transformers' streamer, which also records the ids and passes the text to `write`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], strip: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.strip = write, strip
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then token by token."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on whole words; an answer does not begin with white space."""
        text = text.lstrip() if self.strip else text
        if text:
            self.strip = False
            self.write(text)
