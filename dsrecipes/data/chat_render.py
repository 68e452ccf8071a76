"""How is a chat template rendered safely? Within a time limit, and with faults as messages.

A template is a program that came with a tokenizer. transformers renders it in jinja2's sandbox, which denies it Python's
objects and the disk, but does not stop an endless loop.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dsrecipes.errors import UserError

_SECONDS = 5
"""Time limit; a real template takes about a millisecond."""
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    RecursionError,
)
"""What a template may raise for a chat."""


class _TimeLimit(BaseException):
    """Interrupts the rendering. Not an Exception, so that no handler in jinja2 or transformers catches it."""


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], generation: bool, **options: Any) -> Any:
    """Render turns with apply_chat_template.

    Args:
        tokenizer: has a chat template.
        turns: role and content of each.
        generation: end with the generation prompt, which begins an answer.
        options: of apply_chat_template; `tokenize` is false by default.

    Returns:
        The text, or what `options` ask for.

    Raises:
        ValueError: the template refuses this chat, or has a fault.
        UserError: the template does not end.
    """
    try:
        # first, because the time limit cannot interrupt a single operation
        _refuse_powers(str(tokenizer.chat_template))
        with _time_limit(_SECONDS):
            return tokenizer.apply_chat_template(turns, add_generation_prompt=generation, **{"tokenize": False} | options)
    except _TimeLimit:
        raise UserError(
            "DSR141",
            f"the tokenizer's chat template ({tokenizer.name_or_path}) is still not done after {_SECONDS} s: it is damaged or "
            "hostile; use --prompt_style alpaca, or fix its chat_template",
        ) from None
    except _FAULTS as error:
        raise ValueError(f"the tokenizer's chat template refuses this chat: {error}") from error
    except MemoryError:
        raise ValueError("the tokenizer's chat template needs more memory than there is") from None


@functools.cache
def _refuse_powers(template: str) -> None:
    """Refuse `**`: a power of large numbers is one step of Python, which no time limit interrupts, and no template needs it."""
    if any(kind == "operator" and value == "**" for _, kind, value in jinja2.Environment().lex(template)):
        raise UserError(
            "DSR142",
            "the tokenizer's chat template computes powers (**), which could run forever: fix its chat_template",
        )


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimeLimit after a time; only the main thread of a Unix process can be interrupted like this."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TimeLimit

    # the handler and the timer of the caller are restored, because a user's program may use SIGALRM too
    before = signal.signal(signal.SIGALRM, stop)
    left = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before)
