"""CSV and TSV files as rows, in the variants that spreadsheets write in different countries."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from dsrecipes.errors import UserError, plural

Row = dict[str, Any]
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_SAMPLE = 50
"""Records that decide between two delimiters."""
_SEP = re.compile(r'"?sep=([^"\r\n])\1*"?\1*\s*', flags=re.IGNORECASE)
"""Excel's own first line, which names the delimiter and is no row; a re-saved one is padded with delimiters."""

csv.field_size_limit(1 << 30)


def table_rows(
    file: Iterator[str], path: object, tabs: bool, start: int = 1, head: Iterable[str] = ()
) -> Iterator[tuple[str, Row]]:
    """Rows of an open CSV (TSV with `tabs`) with the line that each begins at.

    Cells keep the text of the file. Empty rows and columns without a name are left out.

    Args:
        file: its lines.
        start: number of the line that `file` begins at.
        head: the first lines of the file, where `start` is a later one.

    Raises:
        UserError: not CSV, a column name twice, or a row with more or fewer fields than the header has columns.
    """
    lines = list(islice(head or file, 20 * _SAMPLE))
    delimiter, skipped = _delimiter(lines, "\t" if tabs else ",")
    header: list[str] | None = None
    if start > 1:
        first = _records(iter(lines[skipped:]), path, skipped, delimiter, [])
        header = next(_header(fields, path) for _, fields in first if any(map(str.strip, fields)))
        records = _records(file, path, start - 1, delimiter, header)
    else:
        records = _records(islice(chain(lines, file), skipped, None), path, skipped, delimiter, [])
    for line, fields in records:
        if not any(map(str.strip, fields)):
            continue
        if header is None:
            header = _header(fields, f"{path}, line {line}")
            continue
        yield f"{path}, line {line}", _row(header, fields, f"{path}, line {line}", delimiter)


def _records(
    lines: Iterator[str], path: object, skipped: int, delimiter: str, header: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """The line that each record begins at, and its fields; `header` is empty where the first record is the header."""
    if delimiter == "\t":
        yield from _tab_records(lines, path, skipped, header)
        return
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    start = skipped + 1
    try:
        for fields in reader:
            yield start, fields
            start = skipped + reader.line_num + 1
    except csv.Error as error:
        raise _not_csv(error, path, skipped + reader.line_num) from None


def _tab_records(lines: Iterator[str], path: object, skipped: int, header: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Like _records, for tabs, where a quote may be a plain character.

    Many programs write TSV without quoting. A record that is no correct quoting, or that would merge lines each of which
    has the header's columns, is one line with plain quotes.
    """
    waiting: deque[str] = deque()
    record: list[str] = []

    def source() -> Iterator[str]:
        while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
            record.append(line)
            yield line

    start = skipped + 1
    while True:
        record.clear()
        problem: csv.Error | None = None
        try:
            fields = next(csv.reader(source(), strict=True, delimiter="\t"), None)
        except csv.Error as error:
            fields, problem = [], error
        if fields is None:
            return
        splits = [line.rstrip("\r\n").split("\t") for line in (record if len(header) > 1 else ())]
        merged = len(splits) > 1 and all(_fits(header, split) for split in splits)
        if splits and _fits(header, splits[0]) and (problem or merged):
            fields = splits[0]
            waiting.extendleft(reversed(record[1:]))
            del record[1:]
        elif problem:
            raise _not_csv(problem, path, start + len(record) - 1)
        header = header or (fields if any(map(str.strip, fields)) else [])
        yield start, fields
        start += len(record)


def _not_csv(error: csv.Error, path: object, line: int) -> UserError:
    # the text of csv would show a raw delimiter, such as a tab
    why = "a quote inside a cell must be doubled" if "expected after" in str(error) else error
    return UserError(f"{path}, line {line}: not CSV ({why})")


def _header(fields: list[str], where: object) -> list[str]:
    names = [name.strip() for name in fields]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: the column name {twice!r} appears twice in the header")
    return names


def _named(header: list[str]) -> int:
    """Number of columns up to the last one that has a name: a trailing delimiter begins no column."""
    return max((number for number, name in enumerate(header, 1) if name.strip()), default=0)


def _fits(header: list[str], fields: list[str]) -> bool:
    """Whether a row has the header's columns; spreadsheets pad rows and headers with empty cells."""
    return len(fields) >= _named(header) and not any(map(str.strip, fields[len(header) :]))


def _row(header: list[str], fields: list[str], where: str, delimiter: str) -> Row:
    if not _fits(header, fields):
        raise UserError(
            f"{where}: {plural(len(fields), 'field')} where the header has {plural(_named(header), 'column')} (separated by "
            f"{_DELIMITERS.get(delimiter, delimiter)}); a cell that contains the separator, a quote or a line break needs double quotes around it"
        )
    return {name: field for name, field in zip(header, fields, strict=False) if name}


def _delimiter(lines: list[str], default: str) -> tuple[str, int]:
    """The delimiter, and the number of lines before the table: one where Excel's `sep=` line names the delimiter."""
    sep_line = _SEP.fullmatch(lines[0]) if lines else None
    if sep_line:
        return sep_line[1], 1
    samples = {delimiter: _sample(lines, delimiter) for delimiter in (default, *_DELIMITERS)}
    # only a character that splits the header is a candidate: cells of later rows may contain any of them
    shares = {delimiter: _agreement(sample) for delimiter, sample in samples.items() if sample and len(sample[0]) > 1}
    likely = [delimiter for delimiter, share in shares.items() if delimiter == default or share >= 0.5]
    return max(likely, key=lambda delimiter: (shares[delimiter], _named(samples[delimiter][0]) > 1), default=default), 0


def _sample(lines: Iterable[str], delimiter: str) -> list[list[str]]:
    """The first records that have content."""
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        return list(islice((fields for fields in reader if any(map(str.strip, fields))), _SAMPLE))
    except csv.Error:
        return []


def _agreement(sample: list[list[str]]) -> float:
    """Share of the records that have the header's columns."""
    return sum(_fits(sample[0], fields) for fields in sample) / len(sample)
