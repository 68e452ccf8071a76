"""How a run ends early: what the user can mend (exit code 2) and what can simply go on (75), never with a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODE = 2
RESUME_CODE = 75
"""Exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""


class UserError(Exception):
    """What is wrong, where it is (file, row, key) and what to do, in a sentence or two."""


class RunStopped(Exception):
    """A run was asked to leave before its end and has done so; says why, what is saved and how to go on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name` as ` (did you mean X?)`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
