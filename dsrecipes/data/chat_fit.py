"""What is changed in a chat so that a template accepts it? Each template refuses or leaves out other things.

Some refuse system turns, two turns of one role, or tool calls whose arguments are objects. ChatTemplate tries the candidates on
a sample chat (chat_sample.py) and uses the first one that loses nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsrecipes.config.values import as_weight
from dsrecipes.data.chat_sample import Shape
from dsrecipes.data.turns import Turn
from dsrecipes.errors import coded

UNANSWERED = coded("DSR147", "turns after the last answer are left out: no answer follows them")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", flags=re.DOTALL)
_System = Literal["keep", "later", "all"]


@dataclass(frozen=True)
class Fit:
    """The changes that a template needs."""

    system: _System = "keep"
    """Put the text of all system turns, or of those that do not begin the chat, before the next user turn."""
    lead: bool = False
    """Put an empty user turn before an assistant turn that begins the chat."""
    join: bool = False
    """Join neighbouring turns of one role."""
    json_arguments: bool = False
    """Give the arguments of tool calls as JSON text."""
    inline_reasoning: bool = False
    """Put reasoning between <think> and </think> before the text, for templates that read no field for it."""

    def changes(self) -> int:
        """Count the changes; inline reasoning is not one, because no text is lost or moved."""
        return (self.system != "keep") + self.lead + self.join + self.json_arguments

    def notes(self) -> Iterator[str]:
        """Lines for the header about the changes."""
        if self.system != "keep":
            yield "the chat template refuses system turns here: their text is put before that of the next user turn"
        if self.lead:
            yield "the chat template refuses an assistant turn at the beginning: an empty user turn is put before it"
        if self.join:
            yield "the chat template refuses two turns of one role in a row: they are joined, with a blank line between"


def candidates(shape: Shape) -> list[Fit]:
    """List the fits that could matter to chats of this shape, those with the fewest changes first."""
    roles = [role for role, *_ in shape]
    spoken = [role for role in roles if role != "system"]
    has_later_system = "system" in list(itertools.dropwhile(lambda role: role == "system", roles))
    systems: list[_System] = ["keep"]
    if has_later_system and roles[0] == "system":
        systems.append("later")
    if "system" in roles:
        systems.append("all")
    # only changes that can matter are tried, because each candidate costs several renderings
    has_repeats = any(a == b != "tool" for a, b in itertools.pairwise(spoken)) or "system" in roles[1:]
    fits = (
        Fit(system, lead, join, json_arguments)
        for system in systems
        for lead in _options(spoken[:1] == ["assistant"])
        for join in _options(has_repeats)
        for json_arguments in _options(any(calls for *_, calls in shape))
    )
    return sorted(fits, key=Fit.changes)


def _options(possible: bool) -> list[bool]:
    return [False, True] if possible else [False]


def apply_fit(messages: list[Turn], fit: Fit) -> list[Turn]:
    """Change the turns of a chat as the fit says."""
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
    """Put system texts before the text of the next user turn.

    Where an answer comes first, they are appended to the last user turn, or become a user turn of their own.
    """
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
    """Join neighbouring turns of one role.

    Raises:
        ValueError: they have different weights.
    """
    turns: list[Turn] = []
    for number, turn in enumerate(messages, 1):
        before = turns[-1] if turns else {"role": None}
        # results of several calls stay separate turns: each has the id of its call
        if turn["role"] != before["role"] or turn["role"] == "tool":
            turns.append(turn)
            continue
        if weight_of(turn, f"turn {number}") != weight_of(before, f"turn {number - 1}"):
            raise ValueError(
                f"turn {number}: it has the role of the turn before and another weight, so they cannot be joined"
            )
        turns[-1] = _joined_turn(before, turn)
    return turns


def _joined_turn(before: Turn, turn: Turn) -> Turn:
    joined = before | turn
    for name in ("content", "reasoning_content"):
        texts = [text for text in (before.get(name), turn.get(name)) if text]
        if name == "content" or texts:
            joined[name] = "\n\n".join(texts)
    calls = [*(before.get("tool_calls") or []), *(turn.get("tool_calls") or [])]
    if calls:
        # a list is only added where there is a call, because templates test for the key
        joined["tool_calls"] = calls
    return joined


def with_short_ids(messages: list[Turn]) -> list[Turn]:
    """Number tool calls whose ids are not nine letters and digits, and give their results the same ids, in order."""
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
            # results without a known id are taken to be in the order of the calls, as in data without ids
            matches = [pair for pair in waiting if pair[0] is not None and pair[0] == turn.get("tool_call_id")]
            pair = matches[0] if matches else waiting[0]
            waiting.remove(pair)
            turn = turn | {"tool_call_id": pair[1]}
        turns.append(turn)
    return turns


def _with_arguments(turn: Turn, as_text: bool) -> Turn:
    """Give a turn's tool calls their arguments in the form that the template accepts: JSON text, or objects."""
    calls = []
    for call in turn["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # text that is no JSON stays text
                arguments = json.loads(arguments or "{}")
        calls.append({"type": "function", **call, "function": function | {"arguments": arguments}})
    return turn | {"tool_calls": calls}


# ---- turns ----


def trainable_part(messages: list[Turn], reasoning: str) -> list[Turn]:
    """Return the turns up to the last answer, each with a text; --reasoning drop removes reasoning."""
    # turns after the last answer have no label, and would only make the sequence longer
    last = max((index for index, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
    turns = [turn | {"content": turn.get("content") or ""} for turn in messages[: last + 1]]
    if reasoning == "drop":
        turns = [{key: value for key, value in turn.items() if key != "reasoning_content"} for turn in turns]
        turns = [turn | {"content": text_of(turn)} if turn["role"] == "assistant" else turn for turn in turns]
    return turns


def unanswered(messages: list[Turn]) -> list[str]:
    """Return the note of a chat that does not end with an answer."""
    return [] if messages[-1]["role"] == "assistant" else [UNANSWERED]


def text_of(turn: Turn) -> str:
    """Return a turn's text without inline reasoning."""
    return _THINK.sub("", turn["content"], count=1) if _THINK.match(turn["content"]) else turn["content"]


def reasoning_of(turn: Turn) -> str:
    """Return the reasoning before an answer, from a field of its own or from between <think> and </think>, or ''."""
    # data sets made with R1 and Qwen hold reasoning in the text, others in a field
    inline = _THINK.match(turn["content"])
    return turn.get("reasoning_content") or (inline[1] if inline else "")


def weight_of(holder: dict, name: str) -> float:
    """Return the weight of a row or turn, 1 where it has none (ValueError: not a number of 0 or more)."""
    return as_weight(holder.get("weight"), f"the weight of {name}")


def leading_as_context(messages: list[Turn]) -> list[Turn]:
    """Give weight 0 to an assistant turn that begins a chat, where an answer follows: it answers nothing."""
    first = next((index for index, turn in enumerate(messages) if turn["role"] in ("user", "tool")), len(messages))
    if not any(turn["role"] == "assistant" for turn in messages[first:]):
        return messages
    leading = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in messages[:first]]
    return [*leading, *messages[first:]]


def answers_of(messages: list[Turn]) -> list[int]:
    """Return the indices of the assistant turns that can be learned.

    Raises:
        ValueError: there is none.
    """
    answers = [index for index, turn in enumerate(messages) if index and turn["role"] == "assistant"]
    if not answers:
        raise ValueError("the chat has no answer to learn: no assistant turn that follows another turn")
    return answers


def as_parts(messages: list[Turn]) -> list[Turn]:
    """Give contents as lists of parts, as the templates of vision models expect them."""
    return [turn | {"content": [{"type": "text", "text": turn["content"]}] if turn["content"] else []} for turn in messages]
