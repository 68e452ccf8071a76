"""Rows of files, which know where they stand, for errors that say so."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from dsrecipes.data.json_stream import JsonStream
from dsrecipes.data.shapes import SPLITS, kind, row_of, rows_in, splits_in
from dsrecipes.data.table import table_rows
from dsrecipes.errors import UserError
from dsrecipes.io.text import parse_json

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_PIECE = 4096
_PARQUET_ROWS = 1024
"""Rows that are Python objects at a time."""
_BIG, _GZIP = 64 << 20, 8
"""Bytes from which JSON is read in pieces, and how much a gzip file is taken to unpack to."""
_LONG = 1 << 24
"""Characters of a line above which a big .json file is not taken for JSON lines."""
_MOST_TIMES, _MOST_UNPACKED = 200, 64 << 20
"""A gzip file may unpack to so many times its size, and so many bytes: text packs to a tenth, zeros to a thousandth."""
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Byte order marks; UTF-32's first, since its little-endian one begins with UTF-16's."""
_TITLE = re.compile(r" = [^=].*[^=] = \n?")


@dataclass(frozen=True)
class FileRows:
    """The rows of some files, read anew at each pass.

    Iterating gives rows (dicts); `located` gives (where, row) with where as "FILE, line N" or "FILE, row N".
    """

    files: tuple[Path, ...]
    split: str = "train"
    """The rows to take of a JSON file that holds several splits; all rows of any other file."""

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.located())

    def located(self) -> Iterator[tuple[str, Row]]:
        """Rows with the place each stands at; raises UserError for a file that cannot be read."""
        for path in self.files:
            yield from _read(path, self.split)

    @property
    def fingerprint(self) -> str:
        """Hash of the split, and of the files' names and bytes."""
        digest = hashlib.sha256(self.split.encode())
        for path in self.files:
            digest.update(os.fsencode(path.name))
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class LocatedRows:
    """Rows in memory that keep the place each came from."""

    rows: list[tuple[str, Row]]

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.rows)

    def located(self) -> Iterator[tuple[str, Row]]:
        """Rows with the place each stands at."""
        return iter(self.rows)


def located(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """(where, row) of any rows: a datasets.Dataset, a list, or what knows its places itself."""
    if hasattr(rows, "located"):
        yield from rows.located()
    else:
        is_arrow = hasattr(rows, "features")
        for number, row in enumerate(rows, 1):
            yield f"row {number}", _without_nulls(row) if is_arrow else row


def _without_nulls(row: Row) -> Row:
    """A row of Arrow's: there an object has the keys of all objects of its column, null where they are not its own."""
    return {name: _pruned(value) if isinstance(value, (list, dict)) else value for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of the rows' content that costs little where the source already has one."""
    own = getattr(rows, "fingerprint", None) or getattr(rows, "_fingerprint", None)
    if own:
        return own
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def suffix(path: Path) -> str:
    """The kind of file, in lower case, `.gz` left aside."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


class _Unpacked(io.RawIOBase):
    """A gzip file's bytes, up to more than any data packs to: a bomb of a megabyte would fill the memory."""

    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path, "rb")  # noqa: SIM115 (closed by close)
        self._room = _MOST_UNPACKED + _MOST_TIMES * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read1(len(buffer))
        self._room -= len(piece)
        if self._room < 0:
            raise gzip.BadGzipFile(f"it unpacks to more than {_MOST_TIMES} times its size")
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


def _bytes(path: Path) -> io.BufferedReader:
    return io.BufferedReader(_Unpacked(path), 1 << 16) if path.name.endswith(".gz") else path.open("rb")


def _open(path: Path) -> TextIO:
    """The file's text: UTF-8, or UTF-16 and UTF-32 where a byte order mark says so (Excel's "Unicode text")."""
    file = _bytes(path)
    start = file.peek(_PIECE)[:_PIECE]
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in start:
        file.close()
        raise UserError(
            f"{path}: holds zero bytes, so it is not text, or UTF-16 without a byte order mark; save it as UTF-8"
        )
    return io.TextIOWrapper(file, encoding=encoding, newline="")


def _read(path: Path, split: str) -> Iterator[tuple[str, Row]]:
    readers = {
        ".json": partial(_json, split=split), ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _text,
    }  # fmt: skip
    with readable(path):
        yield from readers[suffix(path)](path)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into a UserError that names the file."""
    try:
        try:
            yield
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {_bad_byte(path, error)}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _bad_byte(path: Path, error: UnicodeError) -> str:
    """What is not UTF-8, where, and how to convert the file."""
    if isinstance(error, UnicodeDecodeError) and error.encoding != "utf-8":
        return f"damaged {error.encoding} text ({error.reason}); save it as UTF-8"
    line = 0
    with _bytes(path) as file:
        for block in file:
            try:
                block.decode("utf-8")
            except UnicodeDecodeError as undecodable:
                before = block[: undecodable.start]
                line += before.count(b"\r") + 1  # a file with line ends of old Macs is one block
                encoding = _likely_encoding(block + file.read(_PIECE * 16))
                return (
                    f"not UTF-8 (byte {block[undecodable.start]:#04x} in line {line}), perhaps {encoding}; save it as UTF-8: "
                    f"iconv -f {encoding} -t UTF-8, or Excel's file type CSV UTF-8"
                )
            line += block.count(b"\r") + (not block.rstrip(b"\n").endswith(b"\r"))
    return "not UTF-8, and it changes while it is read"


def _likely_encoding(sample: bytes) -> str:
    """Guess an encoding for a message: Chinese double bytes come in runs, accented letters are single bytes."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    if sum(len(run) == 1 for run in runs) <= len(runs) / 2:
        # GB2312, the common part of GB18030, first: GB18030 itself decodes most of Big5 too
        for codec, encoding in (("gb2312", "GB18030"), ("cp950", "BIG5"), ("gb18030", "GB18030")):
            with contextlib.suppress(UnicodeDecodeError):
                codecs.getincrementaldecoder(codec)().decode(sample)  # incremental: the sample may end inside a character
                return encoding
    return "CP1252"


def _json(path: Path, split: str) -> Iterator[tuple[str, Row]]:
    if _is_big(path):
        yield from _big_json(path, split)
        return
    value = _json_value(path)
    if value is None:
        yield from _jsonl(path)
        return
    splits = splits_in(value)
    name = f"{split} row" if splits else "row"
    for number, row in enumerate(rows_in(splits.get(split, []) if splits else value, path), 1):
        where = f"{path}, {name} {number}"
        yield where, row_of(row, where)


def _is_big(path: Path) -> bool:
    return path.stat().st_size * (_GZIP if path.name.endswith(".gz") else 1) >= _BIG


def _json_value(path: Path) -> Any:
    """What a JSON file holds; None for JSON lines under this name."""
    with _open(path) as file:
        text = file.read()
    if not text.strip():
        raise UserError(f"{path}: not JSON (the file is empty)")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and "\n" not in text[: error.pos].strip():
            return None
        value = parse_json(text, str(path))  # says what is wrong
    if value is None:
        raise UserError(f"{path}: expected a list of rows, found {kind(value)}")
    return value


def json_splits(path: Path) -> list[str]:
    """The splits that a JSON file holds under their names; none for any other file, and for one that cannot be read."""
    if suffix(path) != ".json":
        return []
    try:
        with _open(path) as file:
            if file.read(_PIECE).lstrip()[:1] != "{":
                return []  # a list, which need not be read twice
        if not _is_big(path):
            return list(splits_in(_json_value(path)))
        if _holds_lines(path):
            return []
        with _open(path) as file:
            return _big_splits(JsonStream(file, str(path)))
    except (UserError, OSError, EOFError, zlib.error, UnicodeError):
        return []  # reading its rows says what is wrong


def _big_splits(stream: JsonStream) -> list[str]:
    """The splits of a JSON object whose lists are all called by the name of one."""
    names = []
    for key in stream.keys():  # noqa: SIM118 (no mapping)
        name = SPLITS.get(key.strip().lower())
        if stream.peek() != "[":
            if isinstance(stream.value(), dict) and name:
                names.append(name)
            continue
        names.append(name)
        for _ in stream.items():
            pass
    return [] if None in names else [str(name) for name in names]


def _holds_lines(path: Path) -> bool:
    """Whether a file named .json holds one object a line."""
    with _open(path) as file:
        first = next((line for line in iter(lambda: file.readline(_LONG), "") if line.strip()), "")
        return len(first) < _LONG and _is_json(first) and bool(file.read(_PIECE).strip())


def _big_json(path: Path, split: str) -> Iterator[tuple[str, Row]]:
    """The rows of a file that would fill the memory: a list, {"data": a list}, lists by split, or JSON lines."""
    if _holds_lines(path):
        yield from _jsonl(path)
        return
    splits = json_splits(path)
    name = f"{split} row" if splits else "row"
    with _open(path) as file:
        stream = JsonStream(file, str(path))
        for values in _row_lists(stream, path, split if splits else None):
            for number, row in enumerate(values, 1):
                where = f"{path}, {name} {number}"
                yield where, row_of(row, where)
        stream.end()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _row_lists(stream: JsonStream, path: Path, split: str | None) -> Iterator[Iterator[Any]]:
    """The list that holds a JSON text's rows; `split` where it has a list for each split."""
    if not stream.peek():
        raise UserError(f"{path}: not JSON (the file is empty)")
    if stream.peek() == "[":
        yield stream.items()
        return
    if stream.peek() != "{":
        raise UserError(f"{path}: expected a list of rows, found {kind(stream.value())}")
    found = pandas = False
    for key in stream.keys():  # noqa: SIM118 (no mapping)
        is_list = stream.peek() == "["
        pandas = pandas or key in ("columns", "schema")  # which say how to read `data`
        wanted = is_list and key == "data" and not pandas
        if split is not None:
            wanted = SPLITS.get(key.strip().lower()) == split
        if wanted and found:
            raise UserError(f"{path}: key {key!r} is written twice")
        found = found or wanted
        if wanted:
            yield stream.items() if is_list else iter(rows_in(stream.value(), path))
        elif not is_list:
            stream.value()
        else:
            for _ in stream.items():
                pass
    if not found:
        yield iter(rows_in(_json_value(path), path))  # columns: the first row is known when all was read


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            if number == 1 and line.strip() == "[":
                raise UserError(f"{where}: one list of rows, where a row a line was expected; rename the file to .json")
            yield where, row_of(parse_json(line, where), where)


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    with _open(path) as file:
        yield from table_rows(file, path, tabs=suffix(path) == ".tsv")


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    with parquet_readable(path):
        number = 0
        source = io.BytesIO(_bytes(path).read()) if path.name.endswith(".gz") else path
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(_PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", _without_nulls(row)


@contextlib.contextmanager
def parquet_readable(path: Path) -> Iterator[None]:
    """Turn what reading Parquet raises into a UserError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # damaged, or a value that Python has no type for
        raise UserError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]})") from None


def _text(path: Path) -> Iterator[tuple[str, Row]]:
    with _open(path) as file:
        for line, row in pieces(file):
            yield f"{path}, line {line}", row


def pieces(lines: Iterable[str], first: int = 1, unfinished: bool = False) -> Iterator[tuple[int, Row]]:
    """Lines as (number of the first line, {"text", "end"}) of about 4 kB; `end` marks the last piece of a document.

    All lines are one document, but a level-1 title in WikiText's form (` = Title = `) starts another.

    Args:
        first: number of the first of the lines.
        unfinished: a piece of this document was given: what ends it must be given too, even when it is blank.
    """
    piece: list[str] = []
    size = 0
    for number, line in enumerate(lines, first):
        line = line.replace("\r\n", "\n")
        title = _TITLE.fullmatch(line) is not None
        if piece and (title or (size >= _PIECE and not line.strip()) or size >= 4 * _PIECE):
            if unfinished or "".join(piece).strip():
                yield first, {"text": "".join(piece), "end": title}
                unfinished = not title
            piece, size, first = [], 0, number
        piece.append(line)
        size += len(line)
    if unfinished or "".join(piece).strip():
        yield first, {"text": "".join(piece), "end": True}


@dataclass(frozen=True)
class LineRows:
    """Rows that are the lines of WikiText, as its hub data set gives them, put together to documents again."""

    rows: Iterable[Row]

    @staticmethod
    def fit(rows: Iterable[Row]) -> bool:
        """Whether a level-1 title stands alone in one of the first rows."""
        return any(_TITLE.fullmatch(str(row.get("text", ""))) for row in islice(rows, 100))

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.located())

    def located(self) -> Iterator[tuple[str, Row]]:
        """Documents with the row that each begins at."""
        lines = (text if text.endswith("\n") else text + "\n" for text in (str(row["text"]) for row in self.rows))
        return ((f"row {number}", row) for number, row in pieces(lines))

    @property
    def fingerprint(self) -> str:
        """The rows' own."""
        return "lines " + fingerprint(self.rows)
