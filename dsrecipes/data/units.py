"""Which rows are in a piece of a file? Reads a piece without reading what precedes it, as far as the kind of file allows.

A streamed run needs this to shuffle pieces, and to resume at a position instead of reading everything again.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dsrecipes.data.decode import BYTE_ORDER_MARKS, readable, suffix
from dsrecipes.data.documents import pieces
from dsrecipes.data.files import read_file
from dsrecipes.data.parquet import parquet_readable
from dsrecipes.data.row import Row, without_nulls
from dsrecipes.data.shapes import row_of
from dsrecipes.data.table import table_rows
from dsrecipes.errors import UserError
from dsrecipes.io.text import parse_json

UNIT = 1 << 17
"""Bytes of a piece: some hundred rows, so that shuffled pieces mix well, and one seek to a piece costs little."""
_ROWS = 256
"""Rows of a piece, where positions are counted in rows."""
_HEAD = 1 << 16
"""Bytes that are read to see what a file is, and the size of read buffers."""
_BOM = b"\xef\xbb\xbf"
_BYTE = ", byte "
Position = dict[str, int]
"""Where in a unit the next piece begins: `offset` and `line`, or the number of `rows` before it."""
Rows = list[tuple[str, Row]]
"""(place, row)."""
Piece = tuple[Rows, Position | None]
"""Rows, and where the next piece of the unit begins; None where the unit ends."""


class BytePlace(str):
    """The place of a row that was located by its byte, `FILE, byte 100`; str() of it is `FILE, line 7`.

    Counting lines means reading the file up to there, so it is done only when a message needs it.
    """

    def __str__(self) -> str:
        """Return `FILE, line 7`."""
        path, _, offset = self.rpartition(_BYTE)
        return f"{path}, line {_line_at(path, int(offset))}"

    def __format__(self, spec: str) -> str:
        """Return `FILE, line 7`."""
        return str(self)


def _line_at(path: str, offset: int) -> int:
    line = 1
    with open(path, "rb") as file:
        while offset and (block := file.read(min(offset, 1 << 20))):
            line, offset = line + block.count(b"\n"), offset - len(block)
    return line


def readable_place(place: str) -> str:
    """Return a place with its line instead of its byte."""
    return str(BytePlace(place)) if _BYTE in place else place


def _access(path: Path) -> str:
    """Decide how a file can be read.

    Returns:
        "jsonl" at any line, "parquet" at any row group, "lines" at saved offsets, "whole" only from its start.
    """
    kind = suffix(path)
    if path.name.endswith(".gz"):
        return "whole"
    if kind == ".parquet":
        return "parquet"
    with readable(path), path.open("rb") as file:
        head = file.read(_HEAD)
    # offsets are counted in UTF-8 lines that end with a line feed; any other text has to be decoded from its start
    has_only_cr = b"\r" in head[:-1] and b"\n" not in head
    if head.startswith(tuple(BYTE_ORDER_MARKS)) or b"\0" in head or has_only_cr:
        return "whole"
    if kind == ".json":
        line, _, rest = head.partition(b"\n")
        try:
            return "jsonl" if isinstance(json.loads(line), dict) and rest.strip() else "whole"
        except (ValueError, RecursionError):
            return "whole"
    return "jsonl" if kind == ".jsonl" else "lines"


class Units:
    """Numbers the units of files, which are read independently: 128 kB of JSON Lines, a row group of Parquet, or another file."""

    def __init__(self, files: tuple[Path, ...], split: str = "train") -> None:
        """Look at the sizes and beginnings of the files; no row is read yet. `split` is that of FileRows."""
        self.files, self.split = files, split
        self.kinds = [_access(path) for path in files]
        self.bytes = [path.stat().st_size for path in files]
        self._groups = {path: _group_rows(path) for path, kind in zip(files, self.kinds, strict=True) if kind == "parquet"}
        counts = [self._units(path, kind, size) for path, kind, size in zip(files, self.kinds, self.bytes, strict=True)]
        self._starts = np.cumsum([0, *counts])

    def _units(self, path: Path, kind: str, size: int) -> int:
        if kind == "jsonl":
            return -(-size // UNIT)
        return len(self._groups[path]) if kind == "parquet" else 1

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def weights(self) -> np.ndarray:
        """Approximate bytes of each unit."""
        counts = np.diff(self._starts)
        return np.repeat(np.array(self.bytes) / np.maximum(counts, 1), counts)

    def progress(self, unit: int, position: Position) -> float:
        """Approximate bytes of a unit before a position; 0 where they are unknown."""
        file = self._file(unit)
        if self.kinds[file] == "parquet":
            group = unit - int(self._starts[file])
            return self.weights[unit] * position["rows"] / self._groups[self.files[file]][group]
        return float(position.get("offset", 0))

    def _file(self, unit: int) -> int:
        return int(np.searchsorted(self._starts, unit, side="right")) - 1

    def pieces(self, unit: int, position: Position | None = None) -> Iterator[Piece]:
        """Yield the rows of a unit from a position on, in pieces.

        Raises:
            UserError: a file cannot be read, or has changed since the stream began.
        """
        file = self._file(unit)
        path, kind, number = self.files[file], self.kinds[file], unit - int(self._starts[file])
        with readable(path):
            # offsets in a file that changes would cut rows in two without an error
            if path.stat().st_size != self.bytes[file]:
                raise UserError(
                    "DSR157",
                    f"{path}: changed while it was streamed; start a new run, and do not change the file while it runs",
                )
            if kind == "jsonl":
                yield _jsonl(path, number * UNIT), None
            elif kind == "parquet":
                yield from _parquet(path, number, self._groups[path], position)
            elif kind == "lines":
                yield from _lines(path, position or {"offset": 0, "line": 1})
            else:
                yield from _counted(read_file(path, self.split), position)


def _jsonl(path: Path, start: int) -> Rows:
    """Read the lines that begin in the unit at byte `start`; the last one may end after the unit."""
    rows: Rows = []
    with path.open("rb", buffering=_HEAD) as file:
        if start:
            # from one byte before, so that a line that begins exactly at `start` is not skipped
            file.seek(start - 1)
            file.readline()  # the rest of a line that belongs to the unit before
        offset = file.tell()
        while offset < start + UNIT and (line := file.readline()):
            place = BytePlace(f"{path}{_BYTE}{offset}")
            text = (line.removeprefix(_BOM) if offset == 0 else line).decode()
            offset += len(line)
            if text.strip():
                rows.append((place, _object(text, place)))
    return rows


def _object(text: str, place: BytePlace) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # json.loads is faster, and parse_json has the message
        row = parse_json(text, str(place))  # raises, with the line and the column
    return row if isinstance(row, dict) else row_of(row, str(place))


def _group_rows(path: Path) -> list[int]:
    """Count the rows of each row group of a Parquet file."""
    import pyarrow.parquet

    with parquet_readable(path):
        metadata = pyarrow.parquet.read_metadata(path)
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _parquet(path: Path, group: int, groups: list[int], position: Position | None) -> Iterator[Piece]:
    """Read a row group in pieces; `groups` are the rows of each group."""
    import pyarrow.parquet

    before, skipped, number = sum(groups[:group]), position["rows"] if position else 0, 0
    batches = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20).iter_batches(_ROWS, row_groups=[group])
    while True:
        # only the reading is guarded: an error that the consumer of a yielded piece raises is not one of the file
        with parquet_readable(path):
            batch = next(batches, None)
            if batch is None:
                return
            first, number = number, number + batch.num_rows
            rows = [without_nulls(row) for row in batch.to_pylist()] if first >= skipped else []
        if first >= skipped:
            places = [f"{path}, row {before + first + row}" for row in range(1, len(rows) + 1)]
            yield list(zip(places, rows, strict=True)), {"rows": number} if number < groups[group] else None


def _counted(rows: Iterator[tuple[str, Row]], position: Position | None) -> Iterator[Piece]:
    """Divide the rows of a file that can only be read from its start, skipping those before the position."""
    number = position["rows"] if position else 0
    rows = islice(rows, number, None)
    while piece := list(islice(rows, _ROWS)):
        number += len(piece)
        yield piece, {"rows": number}


class _Lines:
    """Yields the lines of an open UTF-8 file from an offset on, and records the byte at which each begins."""

    def __init__(self, file: BinaryIO, offset: int, line: int) -> None:
        self.file, self.offset, self.line = file, offset, line
        self.starts: dict[int, int] = {}

    def __iter__(self) -> Iterator[str]:
        self.file.seek(self.offset)
        for raw in self.file:
            if self.offset == 0 and raw.startswith(_BOM):
                raw, self.offset = raw[len(_BOM) :], len(_BOM)
            text = raw.decode()
            # in text mode a line ends at a lone \r too
            for part in io.StringIO(text, newline="") if "\r" in text[:-2] else [text]:
                self.starts[self.line] = self.offset
                self.line, self.offset = self.line + 1, self.offset + len(part.encode())
                yield part


def _lines(path: Path, position: Position) -> Iterator[Piece]:
    """Divide CSV, TSV or text into pieces, cut where a record begins."""
    is_text = suffix(path) == ".txt"
    with path.open("rb", buffering=_HEAD) as file:
        lines, located = _rows_from(file, path, position)
        # a piece ends at the first record after UNIT bytes, because a CSV record may have line breaks inside
        rows: Rows = []
        begin = 0
        for place, row in located:
            line = int(place.rpartition(" ")[2])
            offset = lines.starts[line]
            if rows and offset - begin >= UNIT:
                unfinished = is_text and not rows[-1][1]["end"]
                yield rows, {"offset": offset, "line": line, "unfinished": int(unfinished)}
                rows = []
                lines.starts = {number: start for number, start in lines.starts.items() if number >= line}
            if not rows:
                begin = offset
            rows.append((place, row))
        if rows:
            yield rows, None


def _rows_from(file: BinaryIO, path: Path, position: Position) -> tuple[_Lines, Iterator[tuple[str, Row]]]:
    """Return the lines of an open file from a position on, and the rows that are read from them."""
    kind, first = suffix(path), position["line"]
    # a table needs its header and delimiter again, wherever reading starts
    head = list(islice(_Lines(file, 0, 1), 1000)) if first > 1 and kind != ".txt" else []
    lines = _Lines(file, position["offset"], first)
    if kind == ".txt":
        texts = pieces(lines, first, bool(position.get("unfinished")))
        return lines, ((f"{path}, line {line}", row) for line, row in texts)
    return lines, table_rows(iter(lines), path, kind == ".tsv", first, head)


def digest_bytes(path: Path) -> bytes:
    """Return samples of a file's bytes: 4 kB of its beginning, of its end and of 62 places between them."""
    # a hash of all bytes would read a file of a terabyte before the first step
    size = path.stat().st_size
    samples = []
    with path.open("rb") as file:
        for sample in range(64):
            file.seek(max(0, size - 4096) * sample // 63)
            samples.append(file.read(4096))
    return os.fsencode(path.name) + str(size).encode() + b"".join(samples)
