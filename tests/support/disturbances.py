"""Events that tests inflict on running ranks: real signals, and disks that are really full or gone."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path


def signal(number: int) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


def fill(disk: str, leave: int) -> None:
    """Fill a small disk except for `leave` bytes."""
    with Path(disk, "filler").open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(disk).free - leave))


def free(disk: str) -> None:
    """Delete the filler."""
    Path(disk, "filler").unlink()


def limit(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def remove(folder: str) -> None:
    """Delete a folder that the run uses."""
    shutil.rmtree(folder)


def cover(folder: str) -> None:
    """Mount an empty read-only disk over a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder], check=True)


def uncover(folder: str) -> None:
    """Unmount that disk."""
    subprocess.run(["umount", "-l", folder], check=True)
