"""Rows as records, each with the place it came from; which of them are held out; and encoding that names a bad one."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
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


def record_hash(record: dict) -> int:
    """64 bits of a hash of the record without its weights: equal ones must not be on both sides of a split."""
    text = json.dumps(_without_weights(record), sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.md5(text, usedforsecurity=False).digest()[:8])


def _without_weights(record: dict) -> dict:
    """The record without `weight`, which a turn of a chat may have too."""
    content = {name: value for name, value in record.items() if name != "weight"}
    if isinstance(content.get("messages"), list):
        content["messages"] = [
            {name: value for name, value in turn.items() if name != "weight"} for turn in content["messages"]
        ]
    return content


def hold_out(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Seeded choice of about `share` of the records for validation, equal ones (by key) on the same side.

    Args:
        keys: content_of of each record, in 64 bits: of millions of records two different ones seldom share a key, and
            then only stay on the same side.

    Returns:
        True for each chosen record; for none where there are fewer than two different ones.
    """
    ordered = np.sort(keys)
    firsts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(keys)]).astype(np.int32)
    if len(firsts) < 2:
        return np.zeros(len(keys), bool)
    order = array("i", range(len(firsts)))
    random.Random(seed).shuffle(order)
    shuffled = np.frombuffer(order, np.int32)[:-1]
    sizes = np.diff(firsts, append=np.int32(len(keys)))[shuffled]
    enough = int(np.searchsorted(np.cumsum(sizes), max(1, round(share * len(keys))))) + 1
    chosen = np.sort(ordered[firsts[shuffled[:enough]]])
    return chosen[np.searchsorted(chosen, keys).clip(max=len(chosen) - 1)] == keys


def hold_out_alone(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Like hold_out, but each record is chosen by itself, so that equal ones of several data sets are on the same side.

    The share is met on average. At least one record is held out, and one stays, where there are two different ones.
    """
    if not len(keys) or keys.min() == keys.max():
        return np.zeros(len(keys), bool)
    drawn = keys ^ np.uint64(random.Random(seed).getrandbits(64))
    limit = np.clip(np.uint64(share * 2.0**64), drawn.min(), drawn.max() - np.uint64(1))
    return drawn <= limit


def encode_group(
    recipe: type[RecipeBase],
    group: list[tuple[str, dict]],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    skip_bad_rows: bool,
) -> tuple[dict[str, list], list[int]]:
    """Encode a group; where a row makes it fail, one by one, so that the row can be named or dropped.

    Returns:
        The columns, and the indices of the records that could be encoded.
    """
    try:
        return recipe.encode([record for _, record in group], tokenizer, options), list(range(len(group)))
    except (ValueError, TypeError) as failure:
        good = []
        for index, (where, record) in enumerate(group):
            try:
                recipe.encode([record], tokenizer, options)
            except (ValueError, TypeError) as error:
                if not skip_bad_rows:
                    raise bad_row(where, error) from error
            else:
                good.append(index)
        if len(good) == len(group):
            raise failure  # no row is at fault: a bug in the recipe
        if not good:
            return {"input_ids": [], "labels": []}, []
        return recipe.encode([group[index][1] for index in good], tokenizer, options), good
