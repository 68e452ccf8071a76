"""How do the bytes of a file become text? gzip, byte order marks, and messages about bytes that are not UTF-8."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dsrecipes.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
"""Kinds of files that are read; each may also be packed by gzip (.gz)."""
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""UTF-32's come first, because its little-endian mark begins with UTF-16's."""
PIECE = 4096
"""Bytes or characters that are read to see what a file is."""
_MOST_TIMES, _MOST_UNPACKED = 200, 64 << 20
"""A gzip file may unpack to this many times its size, plus this many bytes: text packs to a tenth, zeros to a thousandth."""


def suffix(path: Path) -> str:
    """Return the kind of a file as its suffix in lower case, without `.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


class _BoundedGzip(io.RawIOBase):
    """Reads a gzip file up to a bound that no real data reaches: otherwise a bomb of a megabyte would fill the memory."""

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


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file for reading bytes, unpacked where it is packed by gzip."""
    return io.BufferedReader(_BoundedGzip(path), 1 << 16) if path.name.endswith(".gz") else path.open("rb")


def open_text(path: Path) -> TextIO:
    """Open a file for reading text: UTF-8, or UTF-16 and UTF-32 where a byte order mark says so (Excel's "Unicode text").

    Raises:
        UserError: it holds zero bytes.
    """
    # utf-8-sig, because Excel and Windows editors write a byte order mark that would become part of the first column's name
    file = open_bytes(path)
    # peek, so that nothing has to be read again: a gzip stream would have to be unpacked from its beginning
    start = file.peek(PIECE)[:PIECE]
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in start:
        file.close()
        raise UserError(
            "DSR117",
            f"{path}: holds zero bytes, so it is not text, or UTF-16 without a byte order mark; save it as UTF-8",
        )
    return io.TextIOWrapper(file, encoding=encoding, newline="")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into a UserError that names the file."""
    try:
        try:
            yield
        except UnicodeDecodeError as error:
            raise UserError("DSR116", f"{path}: {_describe_bad_byte(path, error)}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError("DSR115", f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise UserError("DSR114", f"{path}: cannot be read ({error.strerror or error})") from None


def _describe_bad_byte(path: Path, error: UnicodeError) -> str:
    """Say which byte is not UTF-8, where it is, and how to convert the file."""
    if isinstance(error, UnicodeDecodeError) and error.encoding != "utf-8":
        return f"damaged {error.encoding} text ({error.reason}); save it as UTF-8"
    # the file is read again, because the error of a text stream counts bytes from the beginning of its buffer
    line = 0
    with open_bytes(path) as file:
        for block in file:
            try:
                block.decode("utf-8")
            except UnicodeDecodeError as undecodable:
                before = block[: undecodable.start]
                line += before.count(b"\r") + 1  # a file with line ends of old Macs is one block
                encoding = _likely_encoding(block + file.read(PIECE * 16))
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
