"""How a run ends early: what the user can mend (exit code 2) and what can simply go on (75), never with a traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

EXIT_CODE = 2
RESUME_CODE = 75
"""Exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""
_LONGEST = 2000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a file's content must not do to a terminal, or what cannot be printed."""


class UserError(Exception):
    """What is wrong, where it is (file, row, key) and what to do, in a sentence or two."""

    def __init__(self, message: str) -> None:
        """A quoted value may be of any length and hold anything: its middle is left out, control characters are escaped."""
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with control characters, and what no encoding has, as escapes; line ends and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def inflect(count: float, noun: str) -> str:
    """`row` for 1, else `rows`; `loss` becomes `losses`."""
    if f"{count:.3g}" == "1":
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def plural(count: float, noun: str) -> str:
    """A count and its noun: `1 row`, `0 rows`, `1,200 rows`, `0.5 epochs`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:.3g}"
    return f"{number} {inflect(count, noun)}"


class RunStopped(Exception):
    """A run was asked to leave before its end and has done so; says why, what is saved and how to go on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name` as ` (did you mean X?)`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
