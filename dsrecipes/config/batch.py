"""How large is the batch of a step? global batch = micro batch x accumulation x ranks; the user's own numbers win.

Imports neither torch nor transformers, because `dsrecipes show` prints the batch too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsrecipes.config.layers import Layers
from dsrecipes.errors import UserError
from dsrecipes.io.devices import accelerators

TOTAL, MICRO, ACCUMULATION = "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"
BATCH_KEYS = (TOTAL, MICRO, ACCUMULATION)
_MICRO_DEFAULT = 8
"""Default of transformers.TrainingArguments."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, forward passes of a step, and ranks."""

    micro: int
    accumulation: int
    ranks: int

    @property
    def total(self) -> int:
        """Sequences of a step over all ranks."""
        return self.micro * self.accumulation * self.ranks

    def values(self) -> dict[str, int]:
        """The batch by flag."""
        return {TOTAL: self.total, MICRO: self.micro, ACCUMULATION: self.accumulation}


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`."""
    return next(size for size in range(min(limit, number), 0, -1) if number % size == 0)


def divide_batch(values: Mapping[str, int | None], given: Mapping[str, str], ranks: int) -> Batch:
    """Solve global batch = micro batch x accumulation x ranks; defaults are adjusted to what the user gave.

    Args:
        values: the three numbers by flag, None or absent where nobody gave one; all above 0.
        given: flag -> origin, of those that the user gave; any other value is a default.

    Raises:
        UserError: the numbers that the user gave have no integer solution on these ranks; names them with their origins.
    """
    # Only what the user gave must hold exactly; a recipe's numbers give way.
    fixed: dict[str, int] = {}
    for key in BATCH_KEYS:
        value = values.get(key)
        if key in given and value is not None:
            fixed[key] = value
    micro = values.get(MICRO) or _MICRO_DEFAULT
    if TOTAL in fixed:
        return _divide_fixed_total(fixed, given, ranks, micro)
    total, accumulation = values.get(TOTAL), values.get(ACCUMULATION)
    if ACCUMULATION in fixed or not total:
        return Batch(micro, accumulation or 1, ranks)
    if MICRO not in fixed:
        share = total // ranks
        # A divisor, so that the recipe's total is reached exactly where it can be.
        micro = largest_divisor(share, micro) if total % ranks == 0 else min(micro, max(1, share))
    # A recipe's total is a target: it is approached where the ranks cannot reach it exactly.
    return Batch(micro, max(1, round(total / (micro * ranks))), ranks)


def _divide_fixed_total(fixed: Mapping[str, int], given: Mapping[str, str], ranks: int, micro: int) -> Batch:
    """Solve for a global batch that the user gave, which must come out exactly."""
    # Rounding would change the learning dynamics that the user chose the number for.
    share, remainder = divmod(fixed[TOTAL], ranks)
    if remainder == 0:
        if MICRO not in fixed:
            accumulation = fixed.get(ACCUMULATION, 0)
            micro = share // accumulation if accumulation else largest_divisor(share, micro)
        batch = Batch(micro, fixed.get(ACCUMULATION, share // micro if micro else 0), ranks)
        if batch.total == fixed[TOTAL]:
            return batch
    factors = [f"{key} {fixed[key]} ({given[key]})" if key in fixed else f"{key} ?" for key in (MICRO, ACCUMULATION)]
    equation = " x ".join([*factors, f"ranks {ranks}"])
    raise UserError(
        "DSR042",
        f"the batch does not divide: {TOTAL} {fixed[TOTAL]} ({given[TOTAL]}) = {equation} has no whole solution. Change one "
        f"of them, or the number of ranks{_hint(fixed, ranks)}",
    )


def _hint(fixed: Mapping[str, int], ranks: int) -> str:
    """Global batch sizes that would work."""
    unit = fixed.get(MICRO, 1) * fixed.get(ACCUMULATION, 1) * ranks
    return f"; {TOTAL} can be a multiple of {unit}" if len(fixed) < len(BATCH_KEYS) else f"; {TOTAL} would be {unit}"


def changed_defaults(values: Mapping[str, int | None], given: Mapping[str, str], batch: Batch) -> str | None:
    """One line on the defaults that were adjusted; None where none was."""
    changed = [
        f"{key} {values[key]} became {number}"
        for key, number in batch.values().items()
        if key not in given and values.get(key) not in (None, number)
    ]
    return f"{', '.join(changed)}: defaults are adjusted to the values given and the number of ranks" if changed else None


def ranks_of(procs: str | None, layers: Layers) -> int:
    """The ranks that `dsrecipes train` starts: --procs, or one for each accelerator."""
    if procs is not None and not (procs.isdecimal() and len(procs) < 6 and int(procs) > 0):
        raise UserError("DSR044", f"--procs {procs}: give a number of ranks, 1 or more")
    if procs:
        return int(procs)
    return 1 if layers.is_on("use_cpu") else max(1, accelerators())


def batch_of(layers: Layers, ranks: int) -> dict[str, int]:
    """The batch of a step by flag; empty where a number is malformed, which the parser refuses by name."""
    merged = layers.merged()
    try:
        values = {key: int(str(merged[key][0])) for key in BATCH_KEYS if key in merged}
    except ValueError:
        values = {MICRO: 0}
    if min(values.values(), default=1) < 1:
        return {}
    return divide_batch(values, layers.by_user(), ranks).values()
