"""Where are the rows in a JSON file? Lists, columns of lists, pandas' to_json, and several splits in one file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsrecipes.data.row import Row
from dsrecipes.data.turns import is_turn
from dsrecipes.errors import UserError

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
SPLITS = {alias: split for split, aliases in _NAMES.items() for alias in aliases}
"""Name of a split in files and folders -> train, validation or test."""
_WRAPPERS = ("data", "rows", "examples", "records")
"""Keys that hold the rows of a file with other content."""
_CHATS = ("messages", "conversations", "conversation")
"""Keys of a file that is a single chat."""
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def kind(value: Any) -> str:
    """Return the type of a JSON value for a message."""
    return _KINDS.get(type(value), type(value).__name__)


def row_of(value: Any, place: str) -> Row:
    """Return an item of a list, or a line, as a row: it is an object, the turns of a chat, or text.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        if not is_turn(value[0]):
            raise UserError(
                "DSR123",
                f"{place}: a list of objects that are not turns ({', '.join(map(str, value[0]))}), where a row was expected; "
                "a file that is one list of rows has a name that ends in .json",
            )
        return {"messages": value}
    description = f"a list of {kind(value[0])}" if isinstance(value, list) and value else kind(value)
    raise UserError(
        "DSR123", f"{place}: expected an object with named fields, a list of turns (a chat), or text, found {description}"
    )


def splits_in(value: Any) -> dict[str, Any]:
    """Return the rows of {"train": [...], "test": [...]} by split; empty for a file of another shape."""
    if not isinstance(value, dict):
        return {}
    if isinstance(value.get("data"), dict):
        value = value["data"]
    # an object next to lists is a comment on them, unless it has the name of a split
    kinds = list if any(isinstance(rows, list) for rows in value.values()) else dict
    inner = {
        key: rows for key, rows in value.items() if isinstance(rows, kinds) or (key in SPLITS and isinstance(rows, dict))
    }
    names = {key: SPLITS.get(str(key).strip().lower()) for key in inner}
    if not inner or None in names.values() or len(set(names.values())) < len(names):
        return {}
    return {str(names[key]): rows for key, rows in inner.items()}


def rows_in(value: Any, path: object) -> Iterable[Any]:
    """Return the rows of a JSON file's value; the caller passes each one to row_of.

    Raises:
        UserError: none of the shapes.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise UserError("DSR119", f"{path}: expected a list of rows, found {kind(value)}")
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return _split_orient(value, path)
    if isinstance(value.get("schema"), dict) and isinstance(value.get("data"), list):
        index = value["schema"].get("primaryKey")
        return [_without_row_number(row) if index == ["index"] else row for row in value["data"]]
    # a wrapper before columns: in {"data": [...], "info": [...]} the lists have different meanings
    wrapped = next((value[key] for key in _WRAPPERS if _holds_rows(value.get(key))), None)
    if wrapped is not None:
        return rows_in(wrapped, path)
    # a file that is one chat has lists too, so it is recognized before columns of lists
    if any(_is_chat(value.get(key)) for key in _CHATS):
        return [value]
    # before lists are taken for columns: lists of rows in a wrong split would become one nonsense row
    _refuse_splits(value, path)
    if value and all(isinstance(column, list) for column in value.values()):
        return _columns_of_lists(value, path)
    if value and all(isinstance(column, dict) for column in value.values()):
        return _columns_of_objects(value, path)
    raise UserError(
        "DSR119",
        f"{path}: expected a list of rows, found an object ({', '.join(map(str, list(value)[:8])) or 'empty'}). Write "
        '[{...}, {...}], one object a line (.jsonl), {"train": [...], "test": [...]}, or {"column": [...], ...}',
    )


def _without_row_number(row: Any) -> Any:
    """Remove the index from a row of pandas' orient=table; an index that is no number has content, and stays."""
    if isinstance(row, dict) and isinstance(row.get("index"), int):
        return {name: value for name, value in row.items() if name != "index"}
    return row


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _refuse_splits(value: dict[str, Any], path: object) -> None:
    """Refuse lists of rows of which only some have the name of a split."""
    lists = [key for key, rows in value.items() if _holds_rows(rows)]
    if any(key.strip().lower() in SPLITS for key in lists):
        raise UserError(
            "DSR124",
            f"{path}: holds the lists of rows {', '.join(lists)}, which are not all splits; a list for each of train, "
            "validation and test is read: rename or remove the others",
        )


def _is_chat(value: Any) -> bool:
    return _holds_rows(value) and is_turn(value[0])


def _split_orient(value: dict[str, Any], path: object) -> list[Row]:
    """Read pandas' orient=split; an index that is no row number has content, and becomes a column."""
    columns, data, index = value["columns"], value["data"], value.get("index")
    for number, values in enumerate(data, 1):
        if not isinstance(values, list) or len(values) != len(columns):
            description = f"{len(values)} values" if isinstance(values, list) else kind(values)
            raise UserError(
                "DSR125",
                f"{path}, row {number}: expected {len(columns)} values ({', '.join(map(str, columns))}), found {description}",
            )
    rows = [dict(zip(map(str, columns), values, strict=True)) for values in data]
    if not isinstance(index, list) or len(index) != len(rows) or all(isinstance(label, int) for label in index):
        return rows
    return [{"index": label, **row} for label, row in zip(index, rows, strict=True)]


def _columns_of_lists(value: dict[str, list[Any]], path: object) -> list[Row]:
    lengths = {name: len(column) for name, column in value.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(
            "DSR125", f"{path}: its columns have different lengths ({counts}); each must have a value for every row"
        )
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _columns_of_objects(value: dict[str, dict[str, Any]], path: object) -> list[Row]:
    """Read pandas' default, {column: {row: value}}, or orient=index, {row: {column: value}}.

    Only the keys tell them apart: the level whose keys are numbers is that of the rows.
    """
    # numbers on both levels, or on none, would be a guess, and half of the guesses would swap rows and columns
    outer, inner = _are_numbers(value), _are_numbers(key for column in value.values() for key in column)
    if outer and not inner:
        return list(value.values())
    if not inner or outer:
        raise UserError(
            "DSR126",
            f"{path}: objects in an object, of which neither level is numbered, so rows cannot be told from columns; write "
            'a list of rows (pandas: to_json(path, orient="records"))',
        )
    numbers = dict.fromkeys(number for column in value.values() for number in column)
    return [{name: column.get(number) for name, column in value.items()} for number in numbers]


def _are_numbers(keys: Iterable[str]) -> bool:
    return all(str(key).isdecimal() for key in keys)
