"""Whether this machine, or the limit set for this job (control group), ran out of memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

_NEARLY_ALL = 0.95
"""Share of the memory from which on it counts as exhausted: the kernel kills before all of it is used."""
_UNLIMITED = 1 << 60
"""Version 1 of control groups writes "no limit" as about 2**63."""


def _read_number(path: Path, key: str = "") -> int | None:
    """The first number in a file of the kernel, or the one after `key`; None where there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index(key) + 1] if key else words[0])
    except (OSError, ValueError, IndexError):
        return None


def _control_groups() -> list[Path]:
    """Folders of this process's control group for memory and of its ancestors, innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # version 2 of control groups has one hierarchy for all controllers, written as ""
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup", controllers)
            # In a container the path may not be visible below the root; the root then is the container's own group.
            innermost = root / path.strip("/")
            groups += [group for group in (innermost, *innermost.parents) if group.is_relative_to(root) and group.is_dir()]
    return groups


def _limit(group: Path) -> int | None:
    limit = _read_number(group / "memory.max") or _read_number(group / "memory.limit_in_bytes")
    return limit if limit and limit < _UNLIMITED else None


def _count_kills(groups: list[Path]) -> int:
    """Processes that the kernel has killed for memory so far."""
    names = ("memory.events", "memory.oom_control")
    files = [Path("/proc/vmstat"), *(group / name for group in groups for name in names)]
    return sum(_read_number(path, "oom_kill") or 0 for path in files)


@dataclass
class HostMemory:
    """Samples of free memory during a run: what is free after a process was killed says nothing."""

    groups: list[Path] = field(default_factory=_control_groups)
    least_free: int | None = None
    """Smallest free memory of all samples, in bytes."""

    def __post_init__(self) -> None:
        """Count the kernel's kills from here on."""
        self.kills_before = _count_kills(self.groups)
        self.sample()

    def sample(self) -> None:
        """Record the free memory if it is the smallest so far."""
        kilobytes = _read_number(Path("/proc/meminfo"), "MemAvailable:")
        if kilobytes is not None:
            free = kilobytes * 1024
            self.least_free = min(self.least_free or free, free)

    def report(self) -> tuple[bool, str]:
        """Whether memory ran out or nearly did, and the figures in words."""
        facts = []
        # counted since the start, because the counters are of the machine, or of the whole job
        ran_out = _count_kills(self.groups) > self.kills_before
        if ran_out:
            facts.append("the kernel has killed a process for memory since the start")
        total = (_read_number(Path("/proc/meminfo"), "MemTotal:") or 0) * 1024
        if total and self.least_free is not None:
            ran_out |= self.least_free < (1 - _NEARLY_ALL) * total
            facts.append(f"of the machine's {total / 1e9:.1f} GB at least {self.least_free / 1e9:.1f} GB were free")
        limits = {group: _limit(group) for group in self.groups}
        bounded = [(limit, group) for group, limit in limits.items() if limit]
        if bounded:
            # the narrowest limit is the one that is reached first
            limit, group = min(bounded)
            peak = _read_number(group / "memory.peak") or _read_number(group / "memory.max_usage_in_bytes")
            ran_out |= peak is not None and peak >= _NEARLY_ALL * limit
            used = f", of which {peak / 1e9:.1f} GB were used" if peak else ""
            facts.append(f"the control group {group} has a limit of {limit / 1e9:.1f} GB{used}")
        return ran_out, "; ".join(facts)
