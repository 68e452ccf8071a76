"""How is plain text divided into rows? Pieces of documents, in files and in WikiText's lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from dsrecipes.data.row import Row, fingerprint

_PIECE = 4096
"""Approximate characters of a piece: a row that is short enough to be named in a message and encoded at once."""
_TITLE = re.compile(r" = [^=].*[^=] = \n?")
"""A level-1 title in WikiText's form."""


def pieces(lines: Iterable[str], first: int = 1, unfinished: bool = False) -> Iterator[tuple[int, Row]]:
    """Join lines into pieces of about 4 kB: (number of the first line, {"text", "end"}); `end` marks the end of a document.

    All lines are one document, but a level-1 title in WikiText's form (` = Title = `) starts another one.

    Args:
        lines: of a text.
        first: number of the first of the lines.
        unfinished: earlier lines of the same document were read already: its end must follow, even as a blank piece.
    """
    piece: list[str] = []
    size = 0
    for number, line in enumerate(lines, first):
        # a model would learn \r as a token of its own in texts from Windows
        line = line.replace("\r\n", "\n")
        # cut at blank lines, which a token seldom spans; a text without any is cut at four times the size
        is_title = _TITLE.fullmatch(line) is not None
        if piece and (is_title or (size >= _PIECE and not line.strip()) or size >= 4 * _PIECE):
            if unfinished or "".join(piece).strip():
                yield first, {"text": "".join(piece), "end": is_title}
                unfinished = not is_title
            piece, size, first = [], 0, number
        piece.append(line)
        size += len(line)
    if unfinished or "".join(piece).strip():
        yield first, {"text": "".join(piece), "end": True}


@dataclass(frozen=True)
class LineRows:
    """WikiText's lines, which its hub data set has as rows, joined into documents again.

    Otherwise each line would end with eos, and the model would learn that documents are one line long.
    """

    rows: Iterable[Row]

    @staticmethod
    def fit(rows: Iterable[Row]) -> bool:
        """Return whether one of the first rows is a level-1 title by itself."""
        return any(_TITLE.fullmatch(str(row.get("text", ""))) for row in islice(rows, 100))

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.located())

    def located(self) -> Iterator[tuple[str, Row]]:
        """Yield pieces of documents with the row that each begins at."""
        texts = (str(row["text"]) for row in self.rows)
        lines = (text if text.endswith("\n") else text + "\n" for text in texts)
        return ((f"row {number}", row) for number, row in pieces(lines))

    @property
    def fingerprint(self) -> str:
        """Hash of the rows."""
        return "lines " + fingerprint(self.rows)
