"""How do JSON and JSON Lines files become rows?

Small files are parsed at once, which is faster. Files that would fill the memory are read value by value (io/json_stream.py),
with the same rows and the same messages.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsrecipes.data.decode import PIECE, open_text, suffix
from dsrecipes.data.row import Row
from dsrecipes.data.shapes import SPLITS, kind, row_of, rows_in, splits_in
from dsrecipes.errors import UserError
from dsrecipes.io.json_stream import JsonStream
from dsrecipes.io.text import parse_json

_BIG, _GZIP = 64 << 20, 8
"""Bytes from which JSON is read value by value, and how many times its size a gzip file is assumed to unpack to."""
_LONG = 1 << 24
"""Characters of a line above which a big .json file is not taken for JSON Lines."""


def read_json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file with one JSON value a line."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            if number == 1 and line.strip() == "[":
                raise UserError(
                    "DSR121", f"{place}: one list of rows, where a row a line was expected; rename the file to .json"
                )
            yield place, row_of(parse_json(line, place), place)


def read_json(path: Path, split: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a JSON file; `split` chooses those to take where it holds several splits."""
    if _is_big(path):
        yield from _read_big_json(path, split)
        return
    value = _json_value(path)
    if value is None:
        yield from read_json_lines(path)
        return
    splits = splits_in(value)
    values = splits.get(split, []) if splits else value
    yield from _located(rows_in(values, path), path, split if splits else None)


def _located(values: Any, path: Path, split: str | None) -> Iterator[tuple[str, Row]]:
    """Yield values as rows, with their places."""
    name = "row" if split is None else f"{split} row"
    for number, value in enumerate(values, 1):
        place = f"{path}, {name} {number}"
        yield place, row_of(value, place)


def _is_big(path: Path) -> bool:
    return path.stat().st_size * (_GZIP if path.name.endswith(".gz") else 1) >= _BIG


def _json_value(path: Path) -> Any:
    """Parse a JSON file; None for JSON Lines under this name."""
    with open_text(path) as file:
        text = file.read()
    if not text.strip():
        raise _empty(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # a complete first line with more after it is JSON Lines: many tools write it under the name .json
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and "\n" not in text[: error.pos].strip():
            return None
        value = parse_json(text, str(path))  # raises, with the line and the column
    if value is None:
        raise _not_rows(path, value)
    return value


def _empty(path: Path) -> UserError:
    return UserError("DSR118", f"{path}: not JSON (the file is empty)")


def _not_rows(path: Path, value: Any) -> UserError:
    return UserError("DSR119", f"{path}: expected a list of rows, found {kind(value)}")


def json_splits(path: Path) -> list[str]:
    """Return the splits that a JSON file holds by name; none for other files, and for one that cannot be read."""
    if suffix(path) != ".json":
        return []
    try:
        with open_text(path) as file:
            if file.read(PIECE).lstrip()[:1] != "{":
                return []  # a list, which need not be read twice
        # the splits must be known before the rows, because each split becomes a data set of its own
        if not _is_big(path):
            return list(splits_in(_json_value(path)))
        if _holds_lines(path):
            return []
        with open_text(path) as file:
            return _big_splits(JsonStream(file, str(path)))
    except (UserError, OSError, EOFError, zlib.error, UnicodeError):
        return []  # reading its rows says what is wrong


def _big_splits(stream: JsonStream) -> list[str]:
    """List the splits of a JSON object whose lists all have the name of a split."""
    names: list[str] = []
    others = False
    for key in stream.keys():  # noqa: SIM118 (no mapping)
        name = SPLITS.get(key.strip().lower())
        is_list = stream.peek() == "["
        if is_list:
            _skip(stream)
            others = others or name is None
        elif not isinstance(stream.value(), dict):
            continue
        if name:
            names.append(name)
    return [] if others else names


def _skip(stream: JsonStream) -> None:
    """Read a list without keeping it."""
    for _ in stream.items():
        pass


def _holds_lines(path: Path) -> bool:
    """Return whether a file named .json holds one object a line."""
    with open_text(path) as file:
        first = next((line for line in iter(lambda: file.readline(_LONG), "") if line.strip()), "")
        return len(first) < _LONG and _is_json(first) and bool(file.read(PIECE).strip())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_big_json(path: Path, split: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file that would fill the memory: a list, {"data": a list}, lists by split, or JSON Lines."""
    if _holds_lines(path):
        yield from read_json_lines(path)
        return
    chosen_split = split if json_splits(path) else None
    with open_text(path) as file:
        stream = JsonStream(file, str(path))
        for values in _row_lists(stream, path, chosen_split):
            yield from _located(values, path, chosen_split)
        # a text after the end would be silently ignored otherwise, such as a second list
        stream.end()


def _row_lists(stream: JsonStream, path: Path, split: str | None) -> Iterator[Iterator[Any]]:
    """Yield the list that holds a JSON text's rows; `split` where it has a list for each split."""
    first = stream.peek()
    if not first:
        raise _empty(path)
    if first == "[":
        yield stream.items()
        return
    if first != "{":
        raise _not_rows(path, stream.value())
    has_rows = is_pandas = False
    for key in stream.keys():  # noqa: SIM118 (no mapping)
        is_list = stream.peek() == "["
        is_pandas = is_pandas or key in ("columns", "schema")  # then these say how `data` is to be read
        if split is not None:
            is_rows = SPLITS.get(key.strip().lower()) == split
        else:
            is_rows = is_list and key == "data" and not is_pandas
        if is_rows and has_rows:
            raise UserError("DSR120", f"{path}: key {key!r} is written twice")
        has_rows = has_rows or is_rows
        if is_rows:
            yield stream.items() if is_list else iter(rows_in(stream.value(), path))
        elif is_list:
            _skip(stream)
        else:
            stream.value()
    if not has_rows:
        yield iter(rows_in(_json_value(path), path))  # columns: even the first row is complete only when all is read
