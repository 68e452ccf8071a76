"""How do rows become records: format_row with the place of a faulty row, and encode that finds the faulty record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.encode import RowHooks
from dsrecipes.data.row import Row, located
from dsrecipes.data.usage import ColumnUsage
from dsrecipes.errors import UserError

BAD_ROW = (ValueError, KeyError, TypeError, AttributeError)
"""What the hooks of a recipe raise for a row that does not fit it."""


class Records:
    """The records of rows, in order, with their places; a bad row raises, or is dropped and counted."""

    def __init__(self, format_row: Callable[[Row], dict], rows: Iterable[Row], skip_bad_rows: bool) -> None:
        self.format_row, self.rows, self.skip_bad_rows = format_row, rows, skip_bad_rows
        self.dropped: dict[str, int] = {}
        self.seen = ColumnUsage()
        """Formats and columns of the rows; complete after an iteration."""

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        # counted in local variables, so that a second iteration does not add to the counts of the first
        bad, seen = 0, ColumnUsage()
        for place, row in located(self.rows):
            try:
                record = seen.format(self.format_row, row)
            except BAD_ROW as error:
                if not self.skip_bad_rows:
                    raise bad_row(place, error) from error
                bad += 1
            else:
                yield place, record
        self.dropped = {"bad row": bad} if bad else {}
        self.seen = seen


def fault_of(error: Exception) -> str:
    """Return what is wrong with a row, from one of the exceptions of BAD_ROW."""
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


def bad_row(place: str, error: Exception) -> UserError:
    """Build the message about the row at `place`."""
    return UserError(
        "DSR101", f"{place}: {fault_of(error)}. Fix the row, or pass --skip_bad_rows to drop all rows with a fault"
    )


def record_hash(record: dict) -> int:
    """Hash a record without its weights to 64 bits: records with equal hashes must be on the same side of a split."""
    text = json.dumps(_without_weights(record), sort_keys=True, default=str).encode()
    # md5 for speed: the hash only has to spread records, nobody attacks it
    return int.from_bytes(hashlib.md5(text, usedforsecurity=False).digest()[:8])


def _without_weights(record: dict) -> dict:
    """Return the record without `weight`, which each turn of a chat may have too.

    Two rows that differ only in weight have the same text, so they must not be on both sides of a split.
    """
    content = {name: value for name, value in record.items() if name != "weight"}
    if isinstance(content.get("messages"), list):
        content["messages"] = [
            {name: value for name, value in turn.items() if name != "weight"} for turn in content["messages"]
        ]
    return content


def encode_group(
    recipe: type[RowHooks],
    group: list[tuple[str, dict]],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    skip_bad_rows: bool,
) -> tuple[dict[str, list], list[int]]:
    """Encode a group of records; where that fails, encode them one by one to find the faulty ones.

    Args:
        recipe: gives `encode`.
        group: (place, record).
        tokenizer: passed to `encode`.
        options: passed to `encode`.
        skip_bad_rows: drop faulty records instead of raising.

    Returns:
        The columns, and the indices of the records that could be encoded.

    Raises:
        UserError: a faulty record, with its place.
        ValueError, TypeError: the group fails although each of its records succeeds, which is a bug in the recipe.
    """
    try:
        return recipe.encode([record for _, record in group], tokenizer, options), list(range(len(group)))
    except (ValueError, TypeError) as failure:
        # the error of a tokenizer does not name the row, so the records are tried one by one
        good = []
        for index, (place, record) in enumerate(group):
            try:
                recipe.encode([record], tokenizer, options)
            except (ValueError, TypeError) as error:
                if not skip_bad_rows:
                    raise bad_row(place, error) from error
            else:
                good.append(index)
        # no single record fails, so the recipe's encode does: its own traceback helps more than a message about rows
        if len(good) == len(group):
            raise failure
        if not good:
            return {"input_ids": [], "labels": []}, []
        return recipe.encode([group[index][1] for index in good], tokenizer, options), good
