"""How does a run end early? With one message and exit code 2 for what the user can fix, or 75 for what can be resumed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# argparse's code for a wrong command line; scripts can distinguish it from 1, a crash
EXIT_CODE = 2
RESUME_CODE = 75
"""Exit code of a run that was stopped and can be resumed: EX_TEMPFAIL of sysexits.h, "try again later"."""
_MAX_LENGTH = 2000
"""Characters of a message; a quoted value may be a whole file."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that would control the terminal or cannot be encoded; quoted content of a file may hold them."""


class UserError(Exception):
    """A fault that the user can fix: what is wrong, where (file, row, key) and what to do, and the id of its explanation.

    The id (`DSR042`) ends the printed message; `dsrecipes explain DSR042` prints cause and cure from dsrecipes/messages/.
    It is a class of its own, so that run.py can print one line for it, and a traceback for everything else, which is our bug.
    """

    def __init__(self, code: str, message: str = "") -> None:
        """Shorten a too long message in its middle and escape control characters, because quoted values may hold anything.

        Args:
            code: the id of the fault.
            message: without the id.
        """
        if not message:  # a recipe of the user's own has no ids
            code, message = "", code
        # the middle is cut: the beginning names the place, and the end says what to do
        if len(message) > _MAX_LENGTH:
            message = f"{message[: _MAX_LENGTH // 2]} [...] {message[-_MAX_LENGTH // 2 :]}"
        self.code = code
        self.message = printable(message)
        super().__init__(coded(code, self.message) if code else self.message)

    def at(self, place: str) -> UserError:
        """Return the same fault, preceded by where it is: a file, a row, a flag."""
        return UserError(self.code, f"{place}: {self.message}")


def coded(code: str, message: str) -> str:
    """Return a message with the id of its explanation at the end, for warnings and notes that are not raised."""
    return f"{message} [{code}]"


def printable(text: str) -> str:
    """Return the text with control characters and lone surrogates as escapes; line ends and tabs stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def inflect(count: float, noun: str) -> str:
    """Return `row` for 1, else `rows`; `loss` becomes `losses`."""
    # by the number as it is printed: 0.9999 is shown as 1
    if f"{count:.3g}" == "1":
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def plural(count: float, noun: str) -> str:
    """Return a count and its noun: `1 row`, `0 rows`, `1,200 rows`, `0.5 epochs`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:.3g}"
    return f"{number} {inflect(count, noun)}"


class RunStopped(Exception):
    """A run was asked to stop early and has; the text says why, what is saved and how to resume."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name closest to `name` as ` (did you mean X?)`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
