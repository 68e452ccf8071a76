"""What a run is told from outside, by signals and a time limit; all ranks agree on it at the end of each step."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch

from dsrecipes.launch.environment import BEGAN
from dsrecipes.launch.watchdog import is_wanted

_TWICE = 0.5
"""Seconds within which a second Ctrl-C is the same one: a terminal and a launcher may both pass it on."""
_REASONS = ("", "the time limit", "Ctrl-C (SIGINT)", "SIGTERM", "SIGHUP (the terminal was closed)")
_LEAVE = {signal.SIGINT: 2, signal.SIGTERM: 3, signal.SIGHUP: 4}


class StopSignals:
    """SIGTERM, SIGHUP and one SIGINT: save and leave; two SIGINT: leave now; SIGUSR1: save and go on.

    A context manager: its handlers count inside it. With several ranks it makes a gloo group of its own, so that agreeing
    waits for no accelerator.
    """

    def __init__(self, time_limit: float | None, patience: timedelta | None = None) -> None:
        """`time_limit` in seconds since the run, or the first of its restarts, was started; `patience` with the ranks."""
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self.group = torch.distributed.new_group(backend="gloo", timeout=patience) if several else None
        began = float(os.environ.get(BEGAN) or time.time())
        self.deadline = began + time_limit if time_limit else None
        self.leaving = 0
        """Index of the reason to leave; 0: none. Agreed on by all ranks."""
        self.saving = False
        """Whether to save at the end of this step, agreed on as well; who saves puts it back."""
        self._leave = 0
        self._save = False
        self._interrupted = 0.0
        self._longest = 0.0
        self._last: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            wanted = [*filter(is_wanted, _LEAVE), signal.SIGUSR1]
            self._before = {number: signal.signal(number, self._take) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)
            self.group = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        now = time.monotonic()
        if number == signal.SIGINT and self._interrupted and now - self._interrupted > _TWICE:
            raise KeyboardInterrupt
        if number == signal.SIGINT and not self._interrupted:
            self._interrupted = now
        self._leave = max(self._leave, _LEAVE[signal.Signals(number)])

    def agree(self, *more: float) -> list[float]:
        """Exchange what the ranks were told, and the greatest of each further number; all ranks call it together."""
        if self.deadline is not None and time.time() + 2 * self._longest > self.deadline:
            self._leave = max(self._leave, 1)
        told = [float(self._leave), float(self._save), *more]
        if self.group is not None:
            numbers = torch.tensor(told, dtype=torch.float64)
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self.group)
            told = numbers.tolist()
        self.leaving, self.saving = int(told[0]), self.saving or bool(told[1])
        self._save = False
        return told[2:]

    def step_ended(self) -> None:
        """Measure from one end of a step to the next, saves and evaluations included; the limit leaves time for two such."""
        now = time.monotonic()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now

    @property
    def reason(self) -> str:
        """Why the run leaves, in words."""
        return _REASONS[self.leaving]

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value, on all ranks."""
        if self.group is None:
            return [value]
        values = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values
