"""How fast does a run train, and how much memory did it need?"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainingArguments

from dsrecipes.data.collate import TOKEN_COUNTS


class Clock:
    """Seconds of training between two log lines, without evaluation and saving."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._paused = 0.0

    def start(self) -> None:
        """Start the clock unless it is running."""
        if self._started is None:
            self._started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out."""
        began = time.perf_counter()
        yield
        if self._started is not None:
            self._paused += time.perf_counter() - began

    def lap(self) -> float:
        """Seconds since the start; stops the clock."""
        now = time.perf_counter()
        seconds = now - (self._started or now) - self._paused
        self._started, self._paused = None, 0.0
        # speed divides by it
        return max(seconds, 1e-9)


class SpeedMeter:
    """Useful tokens and rows a second, over training time alone, since the last log line."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._counts = [0, 0]

    def count(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Count a step's tokens and rows, which the collator put into each batch; the model does not take them."""
        for batch in batches:
            counts = batch.pop(TOKEN_COUNTS).tolist()
            self._counts = [total + count for total, count in zip(self._counts, counts, strict=True)]

    def figures(self, args: TrainingArguments) -> dict[str, float]:
        """Speed over all ranks, and the greatest peak memory of any; a collective call."""
        seconds = self.clock.lap()
        # in one message: a log line at every step costs two small collectives and no more
        tokens, rows = sum_over_ranks([float(count) for count in self._counts], args)
        self._counts = [0, 0]
        return {
            "samples_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gb": greatest_of_ranks(peak_memory_gb(args.device), args),
        }


def peak_memory_gb(device: torch.device) -> float:
    """Greatest memory so far in GB (1e9 bytes): allocated on the accelerator, or resident on a CPU run."""
    if device.type != "cpu":
        # torch.accelerator has this function only from torch 2.9 on
        return getattr(torch, device.type).max_memory_allocated(device) / 1e9
    # getrusage(2): bytes on macOS, kilobytes on Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def sum_over_ranks(values: list[float], args: TrainingArguments) -> list[float]:
    """Sum each value over the ranks; a collective call."""
    return _over_ranks(values, args, torch.distributed.ReduceOp.SUM)


def greatest_of_ranks(value: float, args: TrainingArguments) -> float:
    """The greatest value of any rank; a collective call."""
    return _over_ranks([value], args, torch.distributed.ReduceOp.MAX)[0]


def _over_ranks(values: list[float], args: TrainingArguments, operation: Any) -> list[float]:
    if args.world_size == 1:
        return values
    # tokens of a long interval on many ranks are more than fp32 counts exactly
    tensor = torch.tensor(values, dtype=torch.float64, device=args.device)
    torch.distributed.all_reduce(tensor, operation)
    return tensor.tolist()
