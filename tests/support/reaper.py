"""Ends what a test or the session has started and left running, wherever it went: children inherit a tag in their environment.

`python tests/support/reaper.py TAG` waits until its stdin closes, which the kernel does however the session ends, and kills.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

TAG = "DSRECIPES_TEST"
"""Environment variable: SESSION/TEST, or SESSION/ for what outlives a test."""


def kill_tagged(prefix: str) -> list[int]:
    """Kill every other process whose tag begins with `prefix`; returns their ids (Linux; elsewhere none)."""
    killed = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with contextlib.suppress(OSError):
            if pid != os.getpid() and f"\0{TAG}={prefix}".encode() in b"\0" + path.read_bytes():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    return killed


if __name__ == "__main__":
    sys.stdin.read()
    kill_tagged(sys.argv[1])
