"""CSV and TSV files as rows, in the variants that spreadsheets write in different countries."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, TextIO

from dsrecipes.errors import UserError, plural

Row = dict[str, Any]
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_SAMPLE = 50
"""Records that decide between two delimiters."""
_SEP = re.compile(r'"?sep=(.)"?\s*', flags=re.IGNORECASE)
"""Excel's own first line, which names the delimiter and is no row."""

csv.field_size_limit(1 << 30)


def table_rows(file: TextIO, path: object, tabs: bool) -> Iterator[tuple[str, Row]]:
    """Rows of an open CSV (TSV with `tabs`) with the line that each begins at.

    Cells keep the text of the file. Empty rows and columns without a name are left out.

    Raises:
        UserError: not CSV, a column name twice, or a row with more or fewer fields than the header has columns.
    """
    lines = list(islice(file, 20 * _SAMPLE))
    delimiter, skipped = _delimiter(lines, "\t" if tabs else ",")
    reader = csv.reader(islice(chain(lines, file), skipped, None), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    start = skipped + 1
    try:
        for fields in reader:
            line, start = start, skipped + reader.line_num + 1
            if not any(map(str.strip, fields)):
                continue
            if header is None:
                header = _header(fields, f"{path}, line {line}")
                continue
            yield f"{path}, line {line}", _row(header, fields, f"{path}, line {line}", delimiter)
    except csv.Error as error:
        raise UserError(f"{path}, line {skipped + reader.line_num}: not CSV ({error})") from None


def _header(fields: list[str], where: str) -> list[str]:
    names = [name.strip() for name in fields]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: the column name {twice!r} appears twice in the header")
    return names


def _row(header: list[str], fields: list[str], where: str, delimiter: str) -> Row:
    surplus = any(map(str.strip, fields[len(header) :]))  # spreadsheets pad rows with empty cells
    if len(fields) < len(header) or surplus:
        raise UserError(
            f"{where}: {plural(len(fields), 'field')} where the header has {plural(len(header), 'column')} (separated by "
            f"{_DELIMITERS.get(delimiter, delimiter)}); a cell that contains the separator, a quote or a line break needs double quotes around it"
        )
    return {name: field for name, field in zip(header, fields, strict=False) if name}


def _delimiter(lines: list[str], default: str) -> tuple[str, int]:
    """The delimiter, and the number of lines before the table: one where Excel's `sep=` line names the delimiter."""
    sep_line = _SEP.fullmatch(lines[0]) if lines else None
    if sep_line:
        return sep_line[1], 1
    counts = {delimiter: _counts(lines, delimiter) for delimiter in (default, *_DELIMITERS)}
    # only a character that splits the header is a candidate: cells of later rows may contain any of them
    shares = {delimiter: _agreement(fields) for delimiter, fields in counts.items() if fields[:1] > [1]}
    likely = [delimiter for delimiter, share in shares.items() if delimiter == default or share >= 0.5]
    return max(likely, key=lambda delimiter: shares[delimiter], default=default), 0


def _counts(lines: Iterable[str], delimiter: str) -> list[int]:
    """Numbers of fields of the first records that have content."""
    reader = csv.reader(lines, delimiter=delimiter)
    records = (len(fields) for fields in reader if any(map(str.strip, fields)))
    try:
        return list(islice(records, _SAMPLE))
    except csv.Error:
        return []


def _agreement(counts: list[int]) -> float:
    """Share of the records that have as many fields as the header."""
    return counts.count(counts[0]) / len(counts)
