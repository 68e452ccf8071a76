"""Rows as records, each with the place it came from; which of them are held out; and encoding that names a bad one."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from dsrecipes.data.encode import EncodeOptions
from dsrecipes.data.files import Row, located
from dsrecipes.data.seen import Seen
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from dsrecipes.base import RecipeBase


BAD_ROW = (ValueError, KeyError, TypeError, AttributeError)
"""What a recipe's hooks raise for a row that is not theirs."""


class Records:
    """(where, record) of rows through format_row, in order; a bad row stops, or is dropped and counted."""

    def __init__(self, format_row: Callable[[Row], dict], rows: Iterable[Row], skip_bad_rows: bool) -> None:
        self.format_row, self.rows, self.skip_bad_rows = format_row, rows, skip_bad_rows
        self.dropped: dict[str, int] = {}
        self.seen = Seen()
        """Forms and columns of the rows, once they were iterated over."""

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        bad, seen = 0, Seen()
        for where, row in located(self.rows):
            try:
                record = seen.format(self.format_row, row)
            except BAD_ROW as error:
                if not self.skip_bad_rows:
                    raise bad_row(where, error) from error
                bad += 1
            else:
                yield where, record
        self.dropped = {"bad row": bad} if bad else {}
        self.seen = seen


def fault_of(error: Exception) -> str:
    """What one of BAD_ROW says, in words."""
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


def bad_row(where: str, error: Exception) -> UserError:
    """What is wrong with the row that stands there, and what to do."""
    return UserError(f"{where}: {fault_of(error)}. Mend the row, or give --skip_bad_rows to drop such rows")


class Chosen:
    """The records whose number is wanted."""

    def __init__(self, records: Records, wanted: Callable[[int], bool]) -> None:
        self.records, self.wanted = records, wanted

    @property
    def skip_bad_rows(self) -> bool:
        return self.records.skip_bad_rows

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        return (pair for index, pair in enumerate(self.records) if self.wanted(index))


def content_of(record: dict) -> str:
    """A hash of the record: equal ones must not stand on both sides of a split."""
    return hashlib.md5(json.dumps(record, sort_keys=True, default=str).encode(), usedforsecurity=False).hexdigest()


def hold_out(keys: list[str], share: float, seed: int) -> set[int]:
    """Seeded choice of about `share` of the records for validation, equal ones (by key) on the same side.

    Returns:
        Indices of the chosen records; empty only where there are fewer than two different ones.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    goal, chosen = max(1, round(share * len(keys))), set[int]()
    for name in names[:-1]:
        if len(chosen) >= goal:
            break
        chosen.update(groups[name])
    return chosen


def encode_group(
    recipe: type[RecipeBase],
    group: list[tuple[str, dict]],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    skip_bad_rows: bool,
) -> tuple[dict[str, list], list[tuple[str, dict]]]:
    """Encode a group; where a row makes it fail, one by one, so that the row can be named or dropped."""
    try:
        return recipe.encode([record for _, record in group], tokenizer, options), group
    except (ValueError, TypeError) as failure:
        good = []
        for where, record in group:
            try:
                recipe.encode([record], tokenizer, options)
            except (ValueError, TypeError) as error:
                if not skip_bad_rows:
                    raise bad_row(where, error) from error
            else:
                good.append((where, record))
        if len(good) == len(group):
            raise failure  # no row is at fault: a bug in the recipe
        return recipe.encode([record for _, record in good], tokenizer, options) if good else {
            "input_ids": [],
            "labels": [],
        }, good
