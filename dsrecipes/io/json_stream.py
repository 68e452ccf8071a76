"""How is a JSON text read that does not fit into memory? Value by value, with Python's own parser.

So it accepts what json.loads accepts, with the same values. Other incremental parsers differ: ijson refuses NaN, which pandas
writes, and numbers above 64 bits, and turns half of a surrogate pair into a question mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from dsrecipes.errors import UserError

_PIECE = 1 << 20
"""Characters that are read at a time."""
_NEAR = 16
"""An error this close to the end of what was read may come from the cut (within -Infinity or an escape), so more is read."""
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class JsonStream:
    """Reads values one after another, with no more than one value and one piece of text in memory."""

    def __init__(self, file: TextIO, where: str) -> None:
        """Begin at the start of an open file; `where` begins the messages."""
        self._file, self._where = file, where
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 1  # of the beginning of _text

    def _read(self) -> None:
        """Drop the text that was used, and read more."""
        used = self._text[: self._at]
        self._line, self._column = self._place(self._at)
        # at least as much as is left, because the decoder starts a value from its beginning each time: so a long value costs
        # twice its length in total, and not its square
        piece = self._file.read(max(_PIECE, len(self._text) - len(used)))
        self._text, self._at, self._ended = self._text[self._at :] + piece, 0, not piece

    def _place(self, at: int) -> tuple[int, int]:
        before = self._text.rfind("\n", 0, at)
        return self._line + self._text.count("\n", 0, at), at - before if before >= 0 else self._column + at

    def _fault(self, problem: str, at: int | None = None) -> UserError:
        line, column = self._place(self._at if at is None else at)
        return UserError("DSR005", f"{self._where}, line {line}, column {column}: not JSON ({problem})")

    def peek(self) -> str:
        """Return the next character that is no space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def take(self, character: str) -> None:
        """Skip a character (UserError: the next one is another)."""
        if self.peek() != character:
            raise self._fault(f"Expecting {character!r}")
        self._at += 1

    def value(self) -> Any:
        """Return the next value (UserError: not JSON)."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR
                if self._ended or not cut:
                    raise self._fault(error.msg, error.pos) from None
            except RecursionError:
                raise UserError("DSR005", f"{self._where}: nested too deeply") from None
            except ValueError as error:  # an integer of thousands of digits
                raise UserError("DSR005", f"{self._where}: not JSON that can be read ({error})") from None
            else:
                if end < len(self._text) or self._ended:  # else a number may continue
                    self._at = end
                    return value
            self._read()

    def items(self) -> Iterator[Any]:
        """Yield the values of an array."""
        self.take("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self.peek() == "]":
                self._at += 1
                return
            self.take(",")

    def keys(self) -> Iterator[str]:
        """Yield the keys of an object; the caller must read the value of each before the next."""
        self.take("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._fault("Expecting property name enclosed in double quotes")
            key = self.value()
            self.take(":")
            yield key
            if self.peek() == "}":
                self._at += 1
                return
            self.take(",")

    def end(self) -> None:
        """Check that nothing follows (UserError)."""
        if self.peek():
            raise self._fault("Extra data")
