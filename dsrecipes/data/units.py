"""Rows of files by position: a piece is read without reading what comes before it, as far as the kind of file allows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from dsrecipes.data.files import _MARKS, Row, _read, _without_nulls, parquet_readable, pieces, readable, suffix
from dsrecipes.data.shapes import row_of
from dsrecipes.data.table import table_rows
from dsrecipes.errors import UserError
from dsrecipes.io.text import parse_json

UNIT = 1 << 17
"""Bytes of a piece."""
_ROWS = 256
"""Rows of a piece, where positions are counted in rows."""
_HEAD = 1 << 16
_BOM = b"\xef\xbb\xbf"
Position = dict[str, int]
"""Where in a unit the next piece begins: `offset` and `line`, or `rows` that come before it."""


_BYTE = ", byte "


class Spot(str):
    """`FILE, byte 100`: the place of a row that was found by its byte; as text it is `FILE, line 7`.

    The line is counted when a message needs it, for that takes reading all that comes before.
    """

    def __str__(self) -> str:
        """`FILE, line 7`."""
        path, _, offset = self.rpartition(_BYTE)
        return f"{path}, line {_line_at(path, int(offset))}"

    def __format__(self, spec: str) -> str:
        """The same."""
        return str(self)


def _line_at(path: str, offset: int) -> int:
    line = 1
    with open(path, "rb") as file:
        while offset and (block := file.read(min(offset, 1 << 20))):
            line, offset = line + block.count(b"\n"), offset - len(block)
    return line


def readable_place(place: str) -> str:
    """A place with its line, where it has a byte."""
    return str(Spot(place)) if _BYTE in place else place


Rows = list[tuple[str, Row]]
Piece = tuple[Rows, Position | None]
"""Rows with their places, and where the next piece of the unit begins; None where the unit ends."""


def _kind(path: Path) -> str:
    """How a file is read: jsonl at any line, parquet at any row group, lines at saved offsets, whole from its start."""
    kind = suffix(path)
    if path.name.endswith(".gz"):
        return "whole"
    if kind == ".parquet":
        return "parquet"
    with readable(path), path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(tuple(_MARKS)) or b"\0" in head or (b"\r" in head[:-1] and b"\n" not in head):
        return "whole"
    if kind == ".json":
        line, _, rest = head.partition(b"\n")
        try:
            return "jsonl" if isinstance(json.loads(line), dict) and rest.strip() else "whole"
        except (ValueError, RecursionError):
            return "whole"
    return "jsonl" if kind == ".jsonl" else "lines"


class Units:
    """Files as numbered units, each read on its own: 128 kB of JSON Lines, a row group of Parquet, or another file."""

    def __init__(self, files: tuple[Path, ...], split: str = "train") -> None:
        """Look at sizes and beginnings; no row is read yet. `split` is that of FileRows."""
        self.files, self.split = files, split
        self.kinds = [_kind(path) for path in files]
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
        """Bytes of each unit, about."""
        counts = np.diff(self._starts)
        return np.repeat(np.array(self.bytes) / np.maximum(counts, 1), counts)

    def progress(self, unit: int, position: Position) -> float:
        """Bytes of a unit before a position, about; 0 where they are not known."""
        file = self._file(unit)
        if self.kinds[file] == "parquet":
            group = unit - int(self._starts[file])
            return self.weights[unit] * position["rows"] / self._groups[self.files[file]][group]
        return float(position.get("offset", 0))

    def _file(self, unit: int) -> int:
        return int(np.searchsorted(self._starts, unit, side="right")) - 1

    def pieces(self, unit: int, position: Position | None = None) -> Iterator[Piece]:
        """The rows of a unit from a position on.

        Raises:
            UserError: a file that cannot be read, or has changed since the stream began.
        """
        file = self._file(unit)
        path, kind, number = self.files[file], self.kinds[file], unit - int(self._starts[file])
        with readable(path):
            if path.stat().st_size != self.bytes[file]:
                raise UserError(f"{path}: changed while it was streamed; start again with a file that stays as it is")
            if kind == "jsonl":
                yield _jsonl(path, number * UNIT), None
            elif kind == "parquet":
                yield from _parquet(path, number, self._groups[path], position)
            elif kind == "lines":
                yield from _lines(path, position or {"offset": 0, "line": 1})
            else:
                yield from _counted(_read(path, self.split), position)


def _jsonl(path: Path, start: int) -> Rows:
    """Rows of the lines that begin in the unit at `start`; the last one may end behind it."""
    rows: Rows = []
    with path.open("rb", buffering=_HEAD) as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that belongs to the unit before
        offset = file.tell()
        while offset < start + UNIT and (line := file.readline()):
            where = Spot(f"{path}{_BYTE}{offset}")
            text = (line.removeprefix(_BOM) if offset == 0 else line).decode()
            offset += len(line)
            if text.strip():
                rows.append((where, _object(text, where)))
    return rows


def _object(text: str, where: Spot) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = parse_json(text, str(where))  # says what is wrong
    return row if isinstance(row, dict) else row_of(row, str(where))


def _group_rows(path: Path) -> list[int]:
    """Rows of each row group of a Parquet file."""
    import pyarrow.parquet

    with parquet_readable(path):
        metadata = pyarrow.parquet.read_metadata(path)
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _parquet(path: Path, group: int, groups: list[int], position: Position | None) -> Iterator[Piece]:
    import pyarrow.parquet

    before, skipped, number = sum(groups[:group]), position["rows"] if position else 0, 0
    batches = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20).iter_batches(_ROWS, row_groups=[group])
    while True:
        with parquet_readable(path):
            batch = next(batches, None)
            first, number = number, number + (batch.num_rows if batch is not None else 0)
            rows = [_without_nulls(row) for row in batch.to_pylist()] if batch is not None and first >= skipped else []
        if batch is None:
            return
        if first >= skipped:
            places = [f"{path}, row {before + first + row}" for row in range(1, len(rows) + 1)]
            yield list(zip(places, rows, strict=True)), {"rows": number} if number < groups[group] else None


def _counted(rows: Iterator[tuple[str, Row]], position: Position | None) -> Iterator[Piece]:
    """Pieces of a file that is read from its start: what comes before the position is read and left out."""
    number = position["rows"] if position else 0
    rows = islice(rows, number, None)
    while piece := list(islice(rows, _ROWS)):
        number += len(piece)
        yield piece, {"rows": number}


class _Lines:
    """Lines of an open UTF-8 file from an offset, which know the byte that each begins at."""

    def __init__(self, file: io.BufferedReader, offset: int, line: int) -> None:
        self.file, self.offset, self.line = file, offset, line
        self.starts: dict[int, int] = {}

    def __iter__(self) -> Iterator[str]:
        self.file.seek(self.offset)
        for raw in self.file:
            if self.offset == 0 and raw.startswith(_BOM):
                raw, self.offset = raw[len(_BOM) :], len(_BOM)
            text = raw.decode()
            # a text file's lines end at a lone \r too
            for part in io.StringIO(text, newline="") if "\r" in text[:-2] else [text]:
                self.starts[self.line] = self.offset
                self.line, self.offset = self.line + 1, self.offset + len(part.encode())
                yield part


def _lines(path: Path, position: Position) -> Iterator[Piece]:
    """Pieces of CSV, TSV or text, cut where a record begins."""
    kind, first = suffix(path), position["line"]
    with path.open("rb", buffering=_HEAD) as file:
        head = list(islice(_Lines(file, 0, 1), 1000)) if first > 1 and kind != ".txt" else []
        lines = _Lines(file, position["offset"], first)
        if kind == ".txt":
            texts = pieces(lines, first, bool(position.get("unfinished")))
            rows = ((f"{path}, line {line}", row) for line, row in texts)
        else:
            rows = table_rows(iter(lines), path, kind == ".tsv", first, head)
        piece: Rows = []
        begin = 0
        for where, row in rows:
            line = int(where.rpartition(" ")[2])
            offset = lines.starts[line]
            if piece and offset - begin >= UNIT:
                unfinished = kind == ".txt" and not piece[-1][1]["end"]
                yield piece, {"offset": offset, "line": line, "unfinished": int(unfinished)}
                piece = []
                lines.starts = {number: start for number, start in lines.starts.items() if number >= line}
            if not piece:
                begin = offset
            piece.append((where, row))
        if piece:
            yield piece, None


def digest_bytes(path: Path) -> bytes:
    """Samples of a file's bytes: its beginning, its end and 62 places between them, each of 4 kB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        found = []
        for sample in range(64):
            file.seek(max(0, size - 4096) * sample // 63)
            found.append(file.read(4096))
    return os.fsencode(path.name) + str(size).encode() + b"".join(found)
