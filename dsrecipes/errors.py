"""The one error that is the user's to mend: a message on rank 0 and exit code 2, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(Exception):
    """What is wrong, where it is (file, row, key) and what to do, in a sentence or two."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name` as ` (did you mean X?)`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
