"""How many GPUs does this machine offer a run?

Importing torch to count them would take seconds, so the drivers are queried where torch is not loaded yet.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def accelerators() -> int:
    """Count the visible accelerators: torch's number where torch is loaded, else the drivers' (NVIDIA, AMD)."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return listed_accelerators()


def listed_accelerators() -> int:
    """Count the GPUs that the drivers list and no environment variable hides; torch may find fewer."""
    # ROCm honours CUDA's variable too
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    count = _nvidia() or _amd()
    return min(count, len(visible.split(","))) if visible else count


def _nvidia() -> int:
    # a command and not NVML, which would be one more dependency; without it (some containers) the device files are counted
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return len([device for device in Path("/dev").glob("nvidia*") if device.name[6:].isdigit()])
    if re.search(r"^\s+MIG ", listing, flags=re.MULTILINE):
        return 1  # CUDA gives a process one MIG instance, however many there are
    return len(re.findall(r"^GPU \d+:", listing, flags=re.MULTILINE))


def _amd() -> int:
    # /dev/kfd is the compute driver; without it the render nodes are those of displays
    if not Path("/dev/kfd").exists() or os.environ.get("HIP_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return 0
    return len(list(Path("/dev/dri").glob("renderD*")))
