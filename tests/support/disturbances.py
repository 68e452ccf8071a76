"""What happens to runs in tests: real signals, real full and vanished disks."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path


def signal(number: int) -> None:
    """Send it to this process."""
    os.kill(os.getpid(), number)


def fill(disk: str, leave: int) -> None:
    """Leave so many bytes free on a small disk."""
    with Path(disk, "filler").open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(disk).free - leave))


def free(disk: str) -> None:
    """Take the filler away."""
    Path(disk, "filler").unlink()


def limit(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def remove(folder: str) -> None:
    """Delete a folder under the run's feet."""
    shutil.rmtree(folder)


def cover(folder: str) -> None:
    """Mount an empty read-only disk over a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder], check=True)


def uncover(folder: str) -> None:
    """Take that disk away again."""
    subprocess.run(["umount", "-l", folder], check=True)
