"""The suite itself: a test that hangs ends, says where, and leaves no process; nothing inherited changes a test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import reaper
from support.tiny import ROOT

pytestmark = pytest.mark.ranks

HUNG = """
import subprocess, sys, threading, time

def wait_in_a_thread():
    time.sleep(600)

def test_hangs():
    threading.Thread(target=wait_in_a_thread, daemon=True).start()
    print("pid", subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(600)"]).pid, flush=True)
    {hang}

def test_next():
    pass
"""


def run_pytest(folder: Path, hang: str, *flags: str) -> tuple[int, str, int]:
    """Exit code, output and the child's process id of a session with our conftest and one test that hangs."""
    shutil.copytree(ROOT / "tests" / "support", folder / "tests" / "support", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_hung.py").write_text(HUNG.format(hang=hang))
    (folder / "setup.cfg").write_text(
        (ROOT / "setup.cfg").read_text("utf-8").replace("faulthandler_timeout = 1800", "faulthandler_timeout = 6")
    )
    words = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "--timeout", "3", *flags, "tests"]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    out = done.stdout + done.stderr
    return done.returncode, out, int(out.partition("pid ")[2].split()[0])


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_test_that_hangs_fails_with_all_stacks_and_leaves_no_process(tmp_path: Path) -> None:
    code, out, child = run_pytest(tmp_path, "time.sleep(600)")
    assert code == 1 and "Timeout (>3.0s)" in out and "1 failed, 1 passed" in out
    assert "wait_in_a_thread" in out and not is_running(child)


def test_one_that_hangs_in_compiled_code_ends_the_session(tmp_path: Path) -> None:
    """A mutex locked twice while the interpreter's lock is held: no Python code runs any more, not even signal handlers."""
    hang = "import ctypes; lock = ctypes.PyDLL(None).pthread_mutex_lock; mutex = bytes(64); lock(mutex), lock(mutex)"
    code, out, child = run_pytest(tmp_path, hang)
    assert code == 1 and "Timeout (0:00:06)!" in out and "wait_in_a_thread" in out and "test_hangs" in out
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(child)


def test_nothing_that_a_session_inherits_reaches_a_test() -> None:
    """Run again by test_..._whatever_it_is_started_with in a session with everything wrong."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGQUIT):
        assert signal.getsignal(number) is not signal.SIG_IGN
    ignored = subprocess.run(["grep", "^Sig[IB]", "/proc/self/status"], capture_output=True, text=True).stdout
    of_libc = 0b11 << 31  # signals 32 and 33, which no program can set
    assert all(int(line.split()[1], 16) & ~of_libc == 0 for line in ignored.splitlines()), ignored
    assert not {"RANK", "MASTER_PORT", "SLURM_NTASKS", "OMP_NUM_THREADS", "COLUMNS", "HF_TOKEN"} & os.environ.keys()
    assert os.environ[reaper.TAG].endswith("(call)") or os.environ[reaper.TAG].rpartition("::")[2].startswith("test_nothing")


def test_it_is_the_same_whatever_it_is_started_with() -> None:
    wrong = {
        "RANK": "1",
        "MASTER_PORT": "1",
        "SLURM_NTASKS": "2",
        "OMP_NUM_THREADS": "7",
        "COLUMNS": "20",
        "LC_ALL": "C",
        "HF_TOKEN": "x",
    }
    name = f"{__file__}::test_nothing_that_a_session_inherits_reaches_a_test"
    words = [
        "bash",
        "-c",
        'trap "" INT TERM HUP CHLD QUIT PIPE; exec "$@"',
        "bash",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        name,
    ]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=os.environ | wrong | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout
