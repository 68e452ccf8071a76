"""What each rank last did, as it recorded it, and which rank the others wait for: died, stopped or without progress."""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

FAULT = "fault.json"
"""File in which the first watchdog that finds a fault claims it."""
PHASES = (
    "starting",
    "reading rows",
    "forward",
    "backward",
    "optimizer step",
    "between steps",
    "evaluating",
    "computing metrics",
    "saving",
    "finishing",
)
# how long these take depends on the size of the model, not on how long they took before
_SLOW_PHASES = {PHASES.index(name) for name in ("starting", "saving", "finishing")}
_MICRO_BATCH_PHASES = {PHASES.index(name) for name in ("forward", "backward")}
# A fixed layout, which one pwrite of a few microseconds replaces: ranks record every phase of every micro batch.
LAYOUT = struct.Struct(f"<32sQQQBBdqqq{len(PHASES)}d")
_STOPPED_SECONDS = 10
"""Seconds that a rank may be stopped (SIGSTOP) before it counts as a fault."""
SUSPENDED_SECONDS = 5
"""Seconds between two checks after which the watcher itself was suspended: what it knows of the others is out of date."""
_SLOW_FACTOR = 10
"""A phase counts as hanging after so many times its longest duration so far."""


@dataclass(frozen=True)
class Heartbeat:
    """The last phase that a rank began."""

    host: bytes
    pid: int
    started: int
    """Start of the process in clock ticks; pid and start together identify a process, since pids are reused."""
    thread: int
    """Identifier of the main thread."""
    phase: int
    """Index in PHASES."""
    ended: bool
    time: float
    """Seconds of time.monotonic() when the phase began."""
    step: int
    micro_batch: int
    count: int
    """Phases begun since the step's first; (step, count) orders the ranks, which all go through the same phases."""
    longest: tuple[float, ...]
    """Longest duration of each phase in seconds, its first time left out; below 0: not completed yet."""

    def position(self) -> str:
        """Step and phase in words."""
        text = f"step {self.step}, {PHASES[self.phase]}" if self.step else PHASES[self.phase]
        return f"{text} (micro batch {self.micro_batch})" if self.phase in _MICRO_BATCH_PHASES else text


@dataclass(frozen=True)
class Fault:
    """A rank that blocks the others."""

    rank: int
    what: str
    """died, stopped or hangs"""
    seconds: float


def read_heartbeat(folder: Path, rank: int) -> Heartbeat | None:
    """A rank's record; None where it left none."""
    try:
        fields = LAYOUT.unpack((folder / f"rank_{rank}").read_bytes())
    except (OSError, struct.error):
        return None
    host, pid, started, thread, phase, ended, time, step, micro_batch, count, *longest = fields
    return Heartbeat(host, pid, started, thread, phase, bool(ended), time, step, micro_batch, count, tuple(longest))


def read_fault(folder: Path) -> tuple[Fault, str] | None:
    """The fault that a watchdog found, and its message."""
    try:
        values = json.loads((folder / FAULT).read_text("utf-8"))
        return Fault(values["rank"], values["what"], values["seconds"]), values["text"]
    except (OSError, ValueError, KeyError):
        return None


def process_stat(pid: int) -> tuple[str, int] | None:
    """State letter and start in clock ticks of a process (proc(5), fields 3 and 22); None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except OSError:
        pass
    # without /proc (macOS) only its existence can be checked
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return None if Path("/proc/self/stat").exists() else ("?", 0)


def process_state(record: Heartbeat) -> str:
    """State letter of a rank's process as ps shows it; X: it has ended."""
    stat = process_stat(record.pid)
    if stat is None or stat[1] != record.started or stat[0] == "Z":
        return "X"
    return stat[0]


def host_id() -> bytes:
    """This machine since its last boot, and the process namespace: equal where process ids mean the same."""
    try:
        # a host name is not unique: containers share one, and cloud images ship one
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:20]
        return f"{boot}{os.stat('/proc/self/ns/pid').st_ino}".encode()[:32].ljust(32)
    except OSError:
        return os.uname().nodename.encode()[:32].ljust(32)


def find_stalled(
    records: dict[int, Heartbeat],
    states: dict[int, str],
    now: float,
    *,
    awake_since: float,
    hang_timeout: float,
    slow_timeout: float,
) -> list[Fault]:
    """Ranks that block the others; several that hang are at the same position.

    Args:
        records: of the ranks of this machine that have not ended.
        states: state letters of their processes.
        now: seconds of time.monotonic().
        awake_since: since when the watcher has not been suspended; earlier silence is not counted.
        hang_timeout: seconds without progress while the others wait; 0: hanging is not checked.
        slow_timeout: the same where no duration is known: a phase's first time, starting, saving, finishing.
    """
    silence = {rank: now - max(record.time, awake_since) for rank, record in records.items()}
    died = [Fault(rank, "died", silence[rank]) for rank in records if states[rank] == "X"]
    # a death explains why the others are silent, so nothing else is looked for
    if died or not hang_timeout:
        return died[:1]
    # a stop that Ctrl-Z and `fg` enclose is no fault; a debugger has the state t and never counts
    limit = min(hang_timeout, _STOPPED_SECONDS)
    stopped = [Fault(rank, "stopped", silence[rank]) for rank in records if states[rank] == "T" and silence[rank] > limit]
    if stopped or len(records) < 2:
        return stopped[:1]
    return _find_hanging(records, silence, hang_timeout, slow_timeout)


def _find_hanging(
    records: dict[int, Heartbeat], silence: dict[int, float], hang_timeout: float, slow_timeout: float
) -> list[Fault]:
    """Ranks that are furthest behind, once all ranks are silent and these for longer than their phase may take."""
    if min(silence.values()) <= min(hang_timeout, SUSPENDED_SECONDS) / 2:
        return []  # some rank still makes progress, so the others are not waiting for long
    position = {rank: (record.step, record.count) for rank, record in records.items()}
    # in a collective, those that wait have gone further than the one that they wait for
    behind = [rank for rank in records if position[rank] == min(position.values())]
    phase = records[behind[0]].phase
    durations = [record.longest[phase] for record in records.values() if record.longest[phase] >= 0]
    # the first time compiles, allocates and fills caches, so that it says nothing about a hang
    if phase in _SLOW_PHASES or any(records[rank].longest[phase] < 0 for rank in behind):
        limit = max(hang_timeout, slow_timeout)
    else:
        limit = max(hang_timeout, _SLOW_FACTOR * max(durations))
    return [Fault(rank, "hangs", silence[rank]) for rank in behind if silence[rank] > limit]


def thread_stack(dump: str, thread: int) -> list[str]:
    """Frames of one thread of a faulthandler dump, innermost first."""
    parts = re.split(r"(?m)^(?:Current thread|Thread) (0x[0-9a-f]+).*$", dump)
    # the last one: the file may hold earlier dumps
    stacks = [frames for name, frames in zip(parts[1::2], parts[2::2], strict=True) if int(name, 16) == thread]
    return [line.strip() for line in stacks[-1].splitlines() if line.strip()] if stacks else []


def is_in_collective(stack: list[str]) -> bool:
    """Whether a thread waits in a collective; a backward pass has its own in C++, so its stack ends in the call."""
    packages = ("/torch/distributed/", "/deepspeed/comm/", "/torch/autograd/")
    return bool(stack) and any(package in stack[0] for package in packages)
