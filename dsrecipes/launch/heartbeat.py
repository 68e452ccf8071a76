"""Where each rank of this machine stands, as it recorded it, and which one the others wait for in vain."""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

FAULT = "fault.json"
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
_PATIENT = {PHASES.index(name) for name in ("starting", "saving", "finishing")}
LAYOUT = struct.Struct(f"<32sQQQBBdqqq{len(PHASES)}d")
_STOPPED = 10
"""Seconds that a stopped rank is waited for."""
ASLEEP = 5
"""Seconds between two looks after which the watcher itself was stopped: what it knows of the others is out of date."""


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stood when it last moved."""

    host: bytes
    pid: int
    born: int
    """Start of the process in clock ticks; with the pid it names the process for good."""
    thread: int
    phase: int
    ended: bool
    time: float
    step: int
    micro: int
    count: int
    """Phases begun since the step's first; (step, count) orders the ranks, which all go through the same phases."""
    longest: tuple[float, ...]
    """Seconds that each phase took at most, its first time left out; below 0: not gone through yet."""

    def where(self) -> str:
        """Step and phase in words."""
        words = f"step {self.step}, {PHASES[self.phase]}" if self.step else PHASES[self.phase]
        return f"{words} (micro batch {self.micro})" if self.phase in (2, 3) else words


@dataclass(frozen=True)
class Fault:
    """A rank that the others wait for in vain."""

    rank: int
    what: str
    """died, stopped or hangs"""
    seconds: float


def read_heartbeat(folder: Path, rank: int) -> Heartbeat | None:
    """A rank's record, or None where it left none."""
    try:
        host, pid, born, thread, phase, ended, *rest = LAYOUT.unpack((folder / f"rank_{rank}").read_bytes())
    except (OSError, struct.error):
        return None
    when, step, micro, count, *longest = rest
    return Heartbeat(host, pid, born, thread, phase, bool(ended), when, step, micro, count, tuple(longest))


def read_fault(folder: Path) -> tuple[Fault, str] | None:
    """What a watcher found, and what it has to say about it."""
    try:
        found = json.loads((folder / FAULT).read_text("utf-8"))
        return Fault(found["rank"], found["what"], found["seconds"]), found["text"]
    except (OSError, ValueError, KeyError):
        return None


def process_stat(pid: int) -> tuple[str, int] | None:
    """State and start of a process (proc(5), fields 3 and 22); None: there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except OSError:
        pass
    try:  # without /proc it can only be asked whether it is there
        os.kill(pid, 0)
        return None if Path("/proc/self/stat").exists() else ("?", 0)
    except OSError:
        return None


def process_state(record: Heartbeat) -> str:
    """State of a rank's process as ps shows it; X: it is gone."""
    found = process_stat(record.pid)
    return "X" if found is None or found[1] != record.born or found[0] == "Z" else found[0]


def host_id() -> bytes:
    """This machine since its last start, and the process namespace: the same where process ids mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:20]
        return f"{boot}{os.stat('/proc/self/ns/pid').st_ino}".encode()[:32].ljust(32)
    except OSError:
        return os.uname().nodename.encode()[:32].ljust(32)


def find_stalled(
    records: dict[int, Heartbeat], states: dict[int, str], now: float, *, awake: float, hang: float, patience: float
) -> list[Fault]:
    """Ranks that the others wait for in vain; several that hang stand at the same place.

    Args:
        records: of the ranks of this machine that have not ended.
        states: of their processes.
        now: time.monotonic().
        awake: since when the one who judges has been awake; nobody's standing still counts from before.
        hang: seconds that a rank may stand still while the others wait; 0: as long as it likes.
        patience: the same where no time is known: a phase's first time, starting, saving, finishing.
    """
    age = {rank: now - max(record.time, awake) for rank, record in records.items()}
    died = [Fault(rank, "died", age[rank]) for rank in records if states[rank] == "X"]
    if died or not hang:
        return died[:1]
    short = min(hang, _STOPPED)
    stopped = [Fault(rank, "stopped", age[rank]) for rank in records if states[rank] == "T" and age[rank] > short]
    if stopped or len(records) < 2:
        return stopped[:1]
    place = {rank: (record.step, record.count) for rank, record in records.items()}
    behind = [rank for rank in records if place[rank] == min(place.values())]
    phase = records[behind[0]].phase
    known = [records[rank].longest[phase] for rank in records if records[rank].longest[phase] >= 0]
    unknown = phase in _PATIENT or any(records[rank].longest[phase] < 0 for rank in behind)
    limit = max(hang, patience) if unknown else max(hang, 10 * max(known))
    all_stand = min(age.values()) > min(hang, ASLEEP) / 2
    return [Fault(rank, "hangs", age[rank]) for rank in behind if all_stand and age[rank] > limit]


def thread_stack(dump: str, thread: int) -> list[str]:
    """Frames of one thread of a faulthandler dump, innermost first."""
    parts = re.split(r"(?m)^(?:Current thread|Thread) (0x[0-9a-f]+).*$", dump)
    wanted = [frames for name, frames in zip(parts[1::2], parts[2::2], strict=True) if int(name, 16) == thread]
    return [line.strip() for line in wanted[-1].splitlines() if line.strip()] if wanted else []


def is_in_collective(stack: list[str]) -> bool:
    """Whether a thread stands in a collective; a backward pass has its own in C++, so it ends in the call."""
    return bool(stack) and any(part in stack[0] for part in ("/torch/distributed/", "/deepspeed/comm/", "/torch/autograd/"))
