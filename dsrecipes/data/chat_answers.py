"""Where are the answers in a rendered chat?

What is trained on must be what a server sends: the ids of the rendered chat, without a token added or left out. An answer
begins where the generation prompt ends, and ends with the end token that the template writes. Where the template opens a
block that the answer does not have (`<think>`), the prompt is the common beginning of both renderings. Where it ignores
add_generation_prompt, the header of the answer belongs to the prompt.

A chat is one sequence where the rendering of each of its beginnings is a prefix of the rendering of the whole chat. Otherwise
(reasoning of earlier turns left out, an end token after the last turn only) each answer is a sequence of its own, whose prompt
is what inference would render at that point.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.chat_fit import (
    answers_of,
    apply_fit,
    leading_as_context,
    reasoning_of,
    trainable_part,
    unanswered,
    weight_of,
    with_short_ids,
)
from dsrecipes.data.chat_sample import shape_of
from dsrecipes.data.chat_template import MARK, NO_REASONING, ChatTemplate, common_length
from dsrecipes.data.turns import Turn

REASONING = "reasoning of answers is trained on; --reasoning drop leaves it out"
"""Note of rows with reasoning: chat and generate then let the model reason too."""
NO_END = "the chat template ends answers with no special token of this tokenizer: eos is added behind each"
IGNORES = "the chat template ignores add_generation_prompt: what it writes before an answer is part of the prompt"
NEW_IDS = "the chat template takes only ids of nine letters and digits: tool calls without one are numbered"
_NINE = re.compile(r"length\s*!=\s*9\b")
"""The check of ids in Mistral's templates."""


@dataclass
class Piece:
    """A rendered chat up to one answer."""

    text: str
    start: int
    """Where the answer begins in the text, in characters."""
    end: int | None
    """Where its end token ends; None where the template writes none."""
    weight: float = 1.0
    own_prompt: bool = False
    """The prompt is not the beginning of the rendering of the answered chat."""
    opened: str = ""
    """The generation prompt, where it ends with a block that the answer does not have."""


@dataclass
class RenderedChat:
    """A text that becomes one sequence, and its answers; the last answer ends the text."""

    text: str
    pieces: list[Piece] = field(default_factory=list)


def render_chat(template: ChatTemplate, chat: dict, options: EncodeOptions) -> tuple[list[RenderedChat], list[str]]:
    """Render a chat ({"messages", "tools", "weight"}) as the texts that become sequences, with notes for the header.

    Raises:
        ValueError: the template cannot show the chat.
    """
    messages = leading_as_context(trainable_part(chat["messages"], options.reasoning))
    tools = chat.get("tools") or None
    fit, notes = template.fit(shape_of(messages), bool(tools))
    notes = [*notes, *unanswered(chat["messages"])]
    turns = apply_fit(messages, fit)
    if _NINE.search(str(template.tokenizer.chat_template)):
        numbered = with_short_ids(turns)
        notes = [*notes, NEW_IDS] if numbered != turns else notes
        turns = numbered
    weights = [weight_of(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]
    turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
    # weights are taken off before rendering, because a template may print every key of a turn
    row_weight = weight_of(chat, "the row")
    answers = answers_of(turns)
    learned = [index for index in answers if weights[index] * row_weight > 0]
    # without an answer to learn the chat is still rendered, so that the row is dropped and counted for that reason
    if not learned:
        return [RenderedChat(template.render(turns[: answers[-1] + 1], False, tools))], notes
    # each answer is located in the rendering up to it, as a server would render it, not in that of the whole chat
    pieces = [replace(_piece(template, turns, index, tools), weight=weights[index] * row_weight) for index in learned]
    notes = [*notes, *_notes(template, [turns[index] for index in learned], pieces)]
    return _joined(pieces), notes


def _notes(template: ChatTemplate, answers: list[Turn], pieces: list[Piece]) -> Iterator[str]:
    """Yield notes on the answers of a chat."""
    reasons = [(piece, reasoning_of(turn).strip()) for turn, piece in zip(answers, pieces, strict=True)]
    reasons = [(piece, reason) for piece, reason in reasons if reason]
    if reasons:
        yield REASONING if any(reason in piece.text[piece.start :] for piece, reason in reasons) else NO_REASONING
    if template.ignores:
        yield IGNORES
    if any(piece.end is None for piece in pieces):
        yield NO_END


def _piece(template: ChatTemplate, messages: list[Turn], index: int, tools: list[dict] | None) -> Piece:
    """Render the chat up to the answer at `index`.

    Raises:
        ValueError: the template writes another prompt once there is an answer, and the answer cannot be found.
    """
    prompt = template.prompt(messages[:index], tools)
    text = template.render(messages[: index + 1], False, tools).removesuffix(template.next_header)
    if text.startswith(prompt) and not template.ignores:
        return _piece_at(template, text, len(prompt))
    turn = {key: MARK for key in ("content", "reasoning_content") if key == "content" or messages[index].get(key)}
    marked = template.render([*messages[:index], {"role": "assistant", **turn}], False, tools)
    # the mark shows where the header ends, which add_generation_prompt cannot show for such a template
    if template.ignores:
        return _piece_at(template, text, common_length(text, marked))
    # the answer's own text may begin as the opened block does, but the mark does not
    start = min(common_length(prompt, text), common_length(prompt, marked))
    opening = len(prompt) - common_length(prompt, template.render(messages[:index], False, tools))
    if len(prompt) - start <= opening:
        return replace(_piece_at(template, text, start), opened=prompt)
    header = prompt[len(prompt) - opening :]
    begins = _end_of_prompt(prompt, text[: common_length(text, marked)], messages[index - 1], header)
    if begins is None:
        raise ValueError(f"turn {index + 1}: the chat template rewrites the prompt of an answer; use --prompt_style alpaca")
    return replace(_piece_at(template, prompt + text[begins:], len(prompt)), own_prompt=True)


def _piece_at(template: ChatTemplate, text: str, start: int) -> Piece:
    return Piece(text, start, template.end_of_answer(text, start))


def _end_of_prompt(prompt: str, text: str, last: Turn, header: str) -> int | None:
    """Find where in `text` a prompt ends whose beginning the template rewrote: after the longest common ending.

    Where the template rewrites the last turn itself (Hermes' tool results), that is the header that the prompt ends with.
    """
    # compared from the end, because it is the beginning of the prompt that templates rewrite
    best, end = 0, None
    for position in range(len(text), -1, -1):
        size = common_length(prompt[::-1], text[:position][::-1])
        if size > best:
            best, end = size, position
    if last["content"].strip() in prompt[len(prompt) - best :]:
        return end
    position = text.rfind(header, common_length(prompt, text)) if header.strip() else -1
    return position + len(header) if position >= 0 else None


def _joined(pieces: list[Piece]) -> list[RenderedChat]:
    """One text where the last rendering has all answers as they were rendered alone; else one text for each answer."""
    # one sequence where possible, because separate ones repeat all turns before each answer
    last = pieces[-1]

    def differs(piece: Piece) -> bool:
        if piece.own_prompt or piece is last:
            return piece.own_prompt
        return piece.end is None or last.text[: piece.end] != piece.text[: piece.end]

    if len(pieces) > 1 and any(map(differs, pieces)):
        return [RenderedChat(piece.text, [piece]) for piece in pieces]
    return [RenderedChat(last.text, pieces)]
