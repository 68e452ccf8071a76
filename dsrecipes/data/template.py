"""A tokenizer's chat template, which may come from anybody: rendered within a time, its faults in words.

transformers renders it in jinja2's sandbox, which keeps it from Python and the disk, but not from going on for ever.
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
"""A real template takes a thousandth of one."""


class _TooLong(BaseException):
    """Raised into the rendering; no Exception, so that nothing on the way takes it for one of its own."""


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], ask: bool, **options: Any) -> Any:
    """What apply_chat_template gives: text, or with `options` token ids.

    Args:
        ask: end with what an answer begins with.

    Raises:
        ValueError: the template refuses this chat, or has a fault.
        UserError: the template does not end.
    """
    try:
        _refuse_powers(str(tokenizer.chat_template))
        with _within(_SECONDS):
            return tokenizer.apply_chat_template(turns, add_generation_prompt=ask, **{"tokenize": False} | options)
    except _TooLong:
        raise UserError(
            f"the tokenizer's chat template ({tokenizer.name_or_path}) is still not done after {_SECONDS} s: it is damaged or hostile; "
            "use --prompt_style alpaca, or mend its chat_template"
        ) from None
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(f"the tokenizer's chat template refuses this chat: {error}") from error
    except MemoryError:
        raise ValueError("the tokenizer's chat template needs more memory than there is") from None


@functools.cache
def _refuse_powers(template: str) -> None:
    """`**` of large numbers is one step of Python, which no time limit ends; no template needs it."""
    if any(kind == "operator" and value == "**" for _, kind, value in jinja2.Environment().lex(template)):
        raise UserError(
            "the tokenizer's chat template computes powers (**), which could take for ever: mend its chat_template"
        )


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise _TooLong after a time; only the main thread of a Unix process can be interrupted so."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    left = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before)
