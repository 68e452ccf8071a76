"""How does a CSV or TSV file become rows? In the variants that spreadsheets write in different countries."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from dsrecipes.data.row import Row
from dsrecipes.errors import UserError, plural

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_SAMPLE = 50
"""Records that are compared to choose a delimiter."""
_SEP = re.compile(r'"?sep=([^"\r\n])\1*"?\1*\s*', flags=re.IGNORECASE)
"""Excel's own first line, which names the delimiter; Excel pads it with delimiters when it saves the file again."""

# the default of 128 kB is less than a long document in a cell
csv.field_size_limit(1 << 30)


def table_rows(
    file: Iterator[str], path: object, tabs: bool, start: int = 1, head: Iterable[str] = ()
) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a CSV or TSV file with their places; a row may have several lines.

    Cells keep the text of the file. Empty rows and columns without a name are left out.

    Args:
        file: lines of the open file.
        path: for messages.
        tabs: whether tabs are more likely than commas to separate the fields.
        start: number of the line that `file` begins at.
        head: the first lines of the file, where `start` is a later one.

    Raises:
        UserError: not CSV, a column name occurs twice, or a row has more or fewer fields than the header has columns.
    """
    # a record may have many lines, so more lines than records are read for the sample
    lines = list(islice(head or file, 20 * _SAMPLE))
    delimiter, skipped = _delimiter(lines, "\t" if tabs else ",")
    header: list[str] | None = None
    # resumed in the middle of a file: the header is parsed again from the file's first lines
    if start > 1:
        first = _records(iter(lines[skipped:]), path, skipped, delimiter, [])
        header = next(_header(fields, path) for _, fields in first if _has_content(fields))
        records = _records(file, path, start - 1, delimiter, header)
    else:
        records = _records(islice(chain(lines, file), skipped, None), path, skipped, delimiter, [])
    for line, fields in records:
        if not _has_content(fields):
            continue
        if header is None:
            header = _header(fields, f"{path}, line {line}")
            continue
        yield f"{path}, line {line}", _row(header, fields, f"{path}, line {line}", delimiter)


def _has_content(fields: list[str]) -> bool:
    return any(map(str.strip, fields))


def _records(
    lines: Iterator[str], path: object, skipped: int, delimiter: str, header: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line that each record begins at, and its fields; `header` is empty where the first record is the header."""
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
    """Yield records as _records does, for tabs, where a quote may be a plain character.

    Many programs write TSV without quoting. Quotes are taken as plain characters where they are not balanced, and where they
    would merge lines that have the header's columns by themselves.
    """
    waiting: deque[str] = deque()
    record: list[str] = []

    def source() -> Iterator[str]:
        while True:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                return
            record.append(line)
            yield line

    start = skipped + 1
    while True:
        record.clear()
        problem: csv.Error | None = None
        try:
            # a reader for each record, because lines that are given back must be parsed again from their beginning
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
        header = header or (fields if _has_content(fields) else [])
        yield start, fields
        start += len(record)


def _not_csv(error: csv.Error, path: object, line: int) -> UserError:
    # the text of csv would show a raw delimiter, such as a tab
    reason = "a quote inside a cell must be doubled" if "expected after" in str(error) else error
    return UserError("DSR127", f"{path}, line {line}: not CSV ({reason})")


def _header(fields: list[str], place: object) -> list[str]:
    names = [name.strip() for name in fields]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError("DSR128", f"{place}: the column name {twice!r} appears twice in the header")
    return names


def _count_named(header: list[str]) -> int:
    """Count the columns up to the last one that has a name: a trailing delimiter begins no column."""
    return max((number for number, name in enumerate(header, 1) if name.strip()), default=0)


def _fits(header: list[str], fields: list[str]) -> bool:
    """Return whether a row has the header's columns; spreadsheets pad rows and headers with empty cells."""
    return len(fields) >= _count_named(header) and not _has_content(fields[len(header) :])


def _row(header: list[str], fields: list[str], place: str, delimiter: str) -> Row:
    if not _fits(header, fields):
        raise UserError(
            "DSR129",
            f"{place}: {plural(len(fields), 'field')} where the header has {plural(_count_named(header), 'column')} (separated by "
            f"{_DELIMITERS.get(delimiter, delimiter)}); a cell that contains the separator, a quote or a line break needs "
            "double quotes around it",
        )
    return {name: field for name, field in zip(header, fields, strict=False) if name}


def _delimiter(lines: list[str], default: str) -> tuple[str, int]:
    """Find the delimiter, and the number of lines before the table: one where Excel's `sep=` line names the delimiter."""
    sep_line = _SEP.fullmatch(lines[0]) if lines else None
    if sep_line:
        return sep_line[1], 1
    # the delimiter is guessed from agreement with the header and not by csv.Sniffer, which takes letters of a text for delimiters
    samples = {delimiter: _sample(lines, delimiter) for delimiter in (default, *_DELIMITERS)}
    # only a character that splits the header is a candidate: cells of later rows may contain any of them
    shares = {delimiter: _agreement(sample) for delimiter, sample in samples.items() if sample and len(sample[0]) > 1}
    # the default needs no majority: a file with many faulty rows still gets messages about them
    likely = [delimiter for delimiter, share in shares.items() if delimiter == default or share >= 0.5]

    def quality(delimiter: str) -> tuple[float, bool]:
        return shares[delimiter], _count_named(samples[delimiter][0]) > 1

    return max(likely, key=quality, default=default), 0


def _sample(lines: Iterable[str], delimiter: str) -> list[list[str]]:
    """Read the first records with content."""
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        return list(islice((fields for fields in reader if _has_content(fields)), _SAMPLE))
    except csv.Error:
        return []


def _agreement(sample: list[list[str]]) -> float:
    """Share of the records that have the header's columns."""
    return sum(_fits(sample[0], fields) for fields in sample) / len(sample)
