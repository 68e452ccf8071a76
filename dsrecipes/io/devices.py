"""How many GPUs does this machine offer a run?

Importing torch to count them would take seconds, so the drivers are queried where torch is not loaded yet.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_DEVICES = Path("/dev")


def accelerators() -> int:
    """Count the visible accelerators: torch's number where torch is loaded, else the drivers' (NVIDIA, AMD)."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return listed_accelerators()


def listed_accelerators() -> int:
    """Count the GPUs that the drivers list and no environment variable hides; torch may find fewer."""
    # where it hides all, no driver is queried; ROCm honours CUDA's variable too
    if not _visible(1, "CUDA_VISIBLE_DEVICES"):
        return 0
    return _visible(_nvidia() or _amd(), "CUDA_VISIBLE_DEVICES")


def _visible(count: int, variable: str) -> int:
    """The number of GPUs that an environment variable leaves of `count`: it lists some of them, or none ("" and -1)."""
    listed = os.environ.get(variable)
    if listed is None:
        return count
    return 0 if listed.strip() in ("", "-1") else min(count, len(listed.split(",")))


def _nvidia() -> int:
    # a command and not NVML, which would be one more dependency; without it (some containers) the device files are counted
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return len([device for device in _DEVICES.glob("nvidia*") if device.name[6:].isdigit()])
    if re.search(r"^\s+MIG ", listing, flags=re.MULTILINE):
        return 1  # CUDA gives a process one MIG instance, however many there are
    return len(re.findall(r"^GPU \d+:", listing, flags=re.MULTILINE))


def _amd() -> int:
    # /dev/kfd is the compute driver; without it the render nodes are those of displays
    if not (_DEVICES / "kfd").exists():
        return 0
    count = len(list((_DEVICES / "dri").glob("renderD*")))
    # HIP selects from what ROCm's runtime leaves
    return _visible(_visible(count, "ROCR_VISIBLE_DEVICES"), "HIP_VISIBLE_DEVICES")
