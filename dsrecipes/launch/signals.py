"""Why a run stops or saves before its end: signals and a time limit, on which all ranks agree after each step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Protocol

from dsrecipes.launch.environment import START_TIME

_SAME_PRESS = 0.5
"""Seconds within which a second Ctrl-C is the same one: a terminal and a launcher may both deliver it."""
_REASONS = ("", "the time limit", "Ctrl-C (SIGINT)", "SIGTERM", "SIGHUP (the terminal was closed)")
_TIME_LIMIT = 1
_STOPPING = {signal.SIGINT: 2, signal.SIGTERM: 3, signal.SIGHUP: 4}
"""Signal that stops a run -> its index in _REASONS."""


class RankGroup(Protocol):
    """What StopSignals needs of a process group; zero/rank_group.py has one of torch, which this module must not import."""

    def greatest(self, values: list[float]) -> list[float]:
        """Maximum over ranks of each value."""

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value, on all ranks."""

    def close(self) -> None:
        """Release the group's connections."""


def should_handle(number: int) -> bool:
    """Whether to handle a signal: nohup's ignored SIGHUP stays ignored, and the ignored SIGINT of a script's `command &`.

    An ignored SIGTERM is handled all the same: scripts ignore it to survive a batch queue's warning themselves, and the
    training should save then.
    """
    return number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN


def restore_child_signal() -> None:
    """Undo an inherited ignored SIGCHLD, which would lose the exit code of every process that this one starts."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class StopSignals:
    """SIGTERM, SIGHUP and one SIGINT: save and stop; two SIGINT: stop now; SIGUSR1: save and continue.

    A context manager: its handlers are installed inside it. A signal reaches ranks at different moments, so that nothing
    happens before `sync`, which all ranks call at the end of a step.
    """

    def __init__(self, time_limit: float | None, group: RankGroup | None = None) -> None:
        """Install nothing yet.

        Args:
            time_limit: seconds since the run, or the first of its restarts, was started.
            group: the other ranks; None where there are none.
        """
        self.group = group
        started = float(os.environ.get(START_TIME) or time.time())
        self.deadline = started + time_limit if time_limit else None
        self.leaving = 0
        """Index of the reason to stop; 0: none. The same on all ranks."""
        self.saving = False
        """Whether to save at the end of this step, the same on all ranks; whoever saves resets it."""
        self._reason = 0
        self._save = False
        self._interrupted_at = 0.0
        self._longest_step = 0.0
        self._step_ended_at: float | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python allows handlers only there; a run in another thread of a notebook has none
        if threading.current_thread() is threading.main_thread():
            handled = [*filter(should_handle, _STOPPING), signal.SIGUSR1]
            self._previous_handlers = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if self.group is not None:
            # its connections would outlive the run in a notebook
            self.group.close()
            self.group = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        now = time.monotonic()
        # the second Ctrl-C leaves at once; all else only sets what `sync` exchanges, since a collective may be under way
        if number == signal.SIGINT and self._interrupted_at and now - self._interrupted_at > _SAME_PRESS:
            raise KeyboardInterrupt
        if number == signal.SIGINT and not self._interrupted_at:
            self._interrupted_at = now
        # the greatest reason wins here as it does between ranks, so that all print the same one
        self._reason = max(self._reason, _STOPPING[signal.Signals(number)])

    def sync(self, *more: float) -> list[float]:
        """Exchange what the ranks received, and return the maximum of each further number; a collective call.

        The time limit leaves time for two of the longest steps, since the next one may be as long and a save follows.
        """
        # wall time, not monotonic: the deadline counts from the first of several starts of the process
        if self.deadline is not None and time.time() + 2 * self._longest_step > self.deadline:
            self._reason = max(self._reason, _TIME_LIMIT)
        values = [float(self._reason), float(self._save), *more]
        if self.group is not None:
            values = self.group.greatest(values)
        # an evaluation syncs between its batches, and must not forget a save that the end of the step owes
        self.leaving, self.saving = int(values[0]), self.saving or bool(values[1])
        self._save = False
        return values[2:]

    def step_ended(self) -> None:
        """Measure the time from the end of one step to the end of the next, with saves and evaluations."""
        now = time.monotonic()
        if self._step_ended_at is not None:
            self._longest_step = max(self._longest_step, now - self._step_ended_at)
        self._step_ended_at = now

    @property
    def reason(self) -> str:
        """Why the run stops, in words."""
        return _REASONS[self.leaving]

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value, on all ranks."""
        return [value] if self.group is None else self.group.all_gather(value)
