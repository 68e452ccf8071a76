"""Whether this machine, or the limit set for this job (control group), ran out of memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

_NEAR = 0.95
_UNLIMITED = 1 << 60
"""Version 1 of control groups writes "no limit" as about 2**63."""


def _number(path: Path, key: str = "") -> int | None:
    """A number in a file of the kernel, or the one beside `key`; None where there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index(key) + 1] if key else words[0])
    except (OSError, ValueError, IndexError):
        return None


def _groups() -> list[Path]:
    """Folders of this process's control group for memory and of the ones that it is in, innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup", controllers)
            inner = root / path.strip("/")  # in a container it may be out of sight: then the root is the container's
            found += [each for each in (inner, *inner.parents) if each.is_relative_to(root) and each.is_dir()]
    return found


def _limit(group: Path) -> int | None:
    limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
    return limit if limit and limit < _UNLIMITED else None


def _kills(groups: list[Path]) -> int:
    """Processes that the kernel has killed for memory so far."""
    files = [Path("/proc/vmstat"), *(each / name for each in groups for name in ("memory.events", "memory.oom_control"))]
    return sum(_number(path, "oom_kill") or 0 for path in files)


@dataclass
class HostMemory:
    """Looked at now and then; what is free after a process was killed says nothing."""

    groups: list[Path] = field(default_factory=_groups)
    least: int | None = None
    """Least memory that was free, in bytes."""

    def __post_init__(self) -> None:
        """Count from here."""
        self.before = _kills(self.groups)
        self.look()

    def look(self) -> None:
        """Keep the least free memory."""
        free = _number(Path("/proc/meminfo"), "MemAvailable:")
        if free is not None:
            self.least = min(self.least or free * 1024, free * 1024)

    def report(self) -> tuple[bool, str]:
        """Whether memory ran out or nearly did, and the numbers."""
        ran_out, words = _kills(self.groups) > self.before, []
        if ran_out:
            words.append("the kernel has killed a process for memory since the start")
        total = (_number(Path("/proc/meminfo"), "MemTotal:") or 0) * 1024
        if total and self.least is not None:
            ran_out |= self.least < (1 - _NEAR) * total
            words.append(f"of the machine's {total / 1e9:.1f} GB at least {self.least / 1e9:.1f} GB were free")
        limits = [(limit, group) for group in self.groups if (limit := _limit(group))]
        if limits:
            limit, group = min(limits)
            peak = _number(group / "memory.peak") or _number(group / "memory.max_usage_in_bytes")
            ran_out |= peak is not None and peak >= _NEAR * limit
            used = f", of which {peak / 1e9:.1f} GB were used" if peak else ""
            words.append(f"the control group {group} has a limit of {limit / 1e9:.1f} GB{used}")
        return ran_out, "; ".join(words)
