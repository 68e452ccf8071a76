"""How does a file become rows? Each kind has its reader; rows know their line, for messages that name it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsrecipes.data.decode import open_text, readable, suffix
from dsrecipes.data.documents import pieces
from dsrecipes.data.json_files import read_json, read_json_lines
from dsrecipes.data.parquet import read_parquet
from dsrecipes.data.row import Row
from dsrecipes.data.table import table_rows


@dataclass(frozen=True)
class FileRows:
    """The rows of some files, read again at each pass, so that no file needs to fit into memory.

    Iterating yields rows (dicts); `located` yields (place, row), where the place is "FILE, line N" or "FILE, row N".
    """

    files: tuple[Path, ...]
    split: str = "train"
    """The rows to take of a JSON file that holds several splits; of any other file all rows are taken."""

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.located())

    def located(self) -> Iterator[tuple[str, Row]]:
        """Yield rows with their places (UserError: a file cannot be read)."""
        for path in self.files:
            yield from read_file(path, self.split)

    @property
    def fingerprint(self) -> str:
        """Hash of the split, and of the files' names and bytes."""
        # names without folders, so that a moved or copied data set is found in the cache
        digest = hashlib.sha256(self.split.encode())
        for path in self.files:
            digest.update(os.fsencode(path.name))
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def read_file(path: Path, split: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file with their places.

    Args:
        path: of a kind in SUFFIXES.
        split: the rows to take of a JSON file that holds several splits.

    Raises:
        UserError: the file cannot be read, or holds no rows.
    """
    with readable(path):
        if suffix(path) == ".json":
            yield from read_json(path, split)
        else:
            yield from _READERS[suffix(path)](path)


def _read_table(path: Path) -> Iterator[tuple[str, Row]]:
    with open_text(path) as file:
        yield from table_rows(file, path, tabs=suffix(path) == ".tsv")


def _read_text(path: Path) -> Iterator[tuple[str, Row]]:
    with open_text(path) as file:
        for line, row in pieces(file):
            yield f"{path}, line {line}", row


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": read_json_lines,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": read_parquet,
    ".txt": _read_text,
}
