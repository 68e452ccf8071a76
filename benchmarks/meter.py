"""What the contestants share: arguments, clock, count of useful tokens, result file. It imports nothing of dsrecipes.

from meter import Counted, Meter, arguments, write_result
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

TOKENS = 2048
"""Useful tokens of an optimizer step, within 5%."""
LENGTH = 512
"""Tokens of the longest row and of a packed sequence."""
RATE = 1e-4
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "trl", "llamafactory", "deepspeed", "dsrecipes")


def arguments(description: str, names: tuple[str, ...]) -> argparse.Namespace:
    """The flags that bench.py gives every contestant, with `set` a dict."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--name", choices=names, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of inputs.make_rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows_per_step", type=int, default=18, help="rows of a step that packs nothing")
    parser.add_argument("--set", type=json.loads, default={}, help="JSON: settings other than the written ones, to try")
    parser.add_argument("--no_save", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="prepare the data alone, and time it")
    parser.add_argument("--workers", type=int, help="processes that prepare the data")
    return parser.parse_args()


class Counted:
    """A collator that counts the tokens of its rows, padding left out, and keeps the first rows it sees."""

    def __init__(self, collate: Callable[[list[dict]], Any], keep: int) -> None:
        """`keep` rows are written into the result, for the comparison with the tokens that ours makes."""
        self.collate, self.keep = collate, keep
        self.tokens: list[int] = []
        self.seen: list[dict[str, list[int]]] = []

    def __call__(self, features: list[dict]) -> Any:
        """Count, then collate. A packed row's mask numbers its examples from 1; 0 is padding."""
        self.tokens.append(
            sum(sum(mask != 0 for mask in row.get("attention_mask", [1] * len(row["input_ids"]))) for row in features)
        )
        for row in features[: self.keep - len(self.seen)]:
            self.seen.append({key: list(map(int, row[key])) for key in ("input_ids", "labels")})
        return self.collate(features)


class Meter(TrainerCallback):
    """Unix time at the end of each optimizer step, the processor time spent, and the step's loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.spent: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.take()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        self.take()

    def take(self) -> None:
        """Take both times: the second tells whether other processes were in the way."""
        self.ends.append(time.time())
        self.spent.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Take the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def micro_batch(rows: int, wanted: int) -> int:
    """The largest divisor of `rows` that is at most `wanted`."""
    return next(size for size in range(min(rows, wanted), 0, -1) if rows % size == 0)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_result(
    args: argparse.Namespace,
    config: dict[str, Any],
    meter: Meter,
    tokens: list[int],
    seen: list[dict[str, list[int]]] | None = None,
) -> None:
    """Write result.json.

    Args:
        meter: times at the start of training and at the end of each step, and losses.
        tokens: useful ones of each micro batch, in order; further ones were fetched ahead.
    """
    accumulation = config.get("gradient_accumulation_steps", 1)
    steps = [
        {
            "seconds": meter.ends[step + 1] - meter.ends[step],
            "processor": meter.spent[step + 1] - meter.spent[step],
            "tokens": sum(tokens[step * accumulation : (step + 1) * accumulation]),
            "loss": loss,
        }
        for step, loss in enumerate(meter.losses)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"name": args.name, "config": config, "steps": steps, "first_step_at": meter.ends[1], "versions": versions()}
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    (args.out / "result.json").write_text(json.dumps(result | {"seen": seen or []}))


def write_prepared(args: argparse.Namespace, seconds: float, rows: int, sequences: int) -> None:
    """Write prepared.json."""
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"name": args.name, "seconds": seconds, "rows": rows, "sequences": sequences, "versions": versions()}
    (args.out / "prepared.json").write_text(json.dumps(result))
