"""Heartbeats of real processes, which rank is at fault, and how the others end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsrecipes.errors import RESUME_CODE
from dsrecipes.launch import environment
from dsrecipes.launch.heartbeat import (
    PHASES,
    Fault,
    Heartbeat,
    find_stalled,
    is_in_collective,
    process_state,
    read_fault,
    read_heartbeat,
    thread_stack,
)
from dsrecipes.launch.watchdog import Watchdog

RANK = """
import sys, threading, time
from pathlib import Path
from dsrecipes.launch.watchdog import Watchdog

run, rank, fault = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
watch = Watchdog(run, rank, range(2), hang_timeout=3, slow_timeout=60, error_fd=2)

def all_reduce(step):  # as a collective waits: until the other is there
    (run / f"{rank}-{step}").touch()
    while not (run / f"{1 - rank}-{step}").exists():
        time.sleep(0.01)

def user_code():
    threading.Event().wait()

for step in range(1, 10**9):
    watch.enter("reading rows", step)
    if fault == "hangs" and rank == 1 and step == 20:
        user_code()
    watch.enter("forward")
    watch.enter("backward")
    all_reduce(step)
    if fault == "ends" and rank == 1 and step == 20:
        watch.end(failed=True)
        time.sleep(3600)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes that do not outlive the test."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(run: Path, fault: str) -> list[subprocess.Popen]:
    """Two ranks that wait for each other at every step."""
    run.mkdir()
    words = [[sys.executable, "-c", RANK, str(run), str(rank), fault] for rank in (0, 1)]
    # with it, the watchdog would leave the message to the launcher
    env = {key: value for key, value in os.environ.items() if key != environment.RUN_FOLDER_FILE}
    return [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for command in words]


def reach(run: Path, step: int) -> Heartbeat:
    """Rank 1's record from that step on."""
    for _ in range(1200):
        record = read_heartbeat(run / "ranks", 1)
        if record and record.step >= step:
            return record
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def test_ranks_that_are_killed_stopped_or_hang_are_named_once_and_all_end(tmp_path: Path, started: list):
    runs = {fault: tmp_path / fault for fault in ("killed", "stopped", "hangs", "ends")}
    ranks = {fault: start(run, fault) for fault, run in runs.items()}
    started += [process for pair in ranks.values() for process in pair]
    records = {fault: reach(run, 20) for fault, run in runs.items()}
    os.kill(records["killed"].pid, signal.SIGKILL)
    os.kill(records["stopped"].pid, signal.SIGSTOP)
    words = {"killed": "died", "stopped": "was stopped", "hangs": r"has made no progress for [3-6] s"}
    for fault, text in words.items():
        assert [rank.wait(20) for rank in ranks[fault]] == [RESUME_CODE, -signal.SIGKILL]
        output = ranks[fault][0].stderr.read()
        assert re.search(rf"error: rank 1 \(pid {records[fault].pid}\) {text}", output), output
        assert (
            output.count("error:") == 1
            and "[DSR309]\n" in output
            and f"--output_dir {runs[fault]} --resume_from_checkpoint auto" in output
        )
        stored = read_fault(runs[fault] / "ranks")
        assert stored and stored[0].rank == 1 and stored[1] in output
    assert "step 20, reading rows" in stored[1] and "in user_code" in stored[1]
    assert [rank.poll() for rank in ranks["ends"]] == [None, None]  # a rank that reported why it ends is not at fault


def record(step: int, count: int, phase: str, moved: float, longest: float = 0.1, **changed: object) -> Heartbeat:
    values = {
        "host": b"", "pid": 1, "started": 1, "thread": 1, "phase": PHASES.index(phase), "ended": False, "time": moved,
        "step": step, "micro_batch": 1, "count": count, "longest": (longest,) * len(PHASES),
    }  # fmt: skip
    return Heartbeat(**(values | changed))


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record(5, 3, "backward", 74), record(5, 1, "forward", 74)], ["rank 1 hangs"]),
        ([record(6, 0, "reading rows", 74), record(5, 9, "saving", 74)], []),
        ([record(5, 3, "backward", 74), record(5, 1, "forward", 76)], []),
        ([record(5, 3, "backward", 98), record(5, 1, "forward", 50)], []),
        ([record(5, 3, "backward", 70, 3), record(5, 1, "forward", 71, 2)], []),
        ([record(5, 3, "backward", 60, 3), record(5, 1, "forward", 65, 2)], ["rank 1 hangs"]),
        ([record(1, 3, "backward", 40), record(1, 1, "forward", 40, -1)], []),
        ([record(5, 3, "backward", 74), record(5, 3, "backward", 74)], ["rank 0 hangs", "rank 1 hangs"]),
        ([record(5, 3, "backward", 74), record(5, 1, "forward", 74), record(5, 3, "backward", 74)], ["rank 1 hangs"]),
    ],
    ids=["behind", "saving", "not long", "others work", "slow phase", "slower", "first time", "same place", "of three"],
)
def test_who_is_waited_for(records: list[Heartbeat], expected: list[str]):
    ranks = dict(enumerate(records))
    faults = find_stalled(ranks, dict.fromkeys(ranks, "S"), 100, awake_since=0, hang_timeout=25, slow_timeout=1800)
    assert [f"rank {fault.rank} {fault.what}" for fault in faults] == expected
    sleeping = dict.fromkeys(ranks, "S")
    # the watcher itself was suspended until 90
    assert not find_stalled(ranks, sleeping, 100, awake_since=90, hang_timeout=25, slow_timeout=1800)
    # --hang_timeout 0 turns the check for hanging off, and not the one for deaths
    assert not find_stalled(ranks, sleeping, 100, awake_since=0, hang_timeout=0, slow_timeout=1800)
    died = find_stalled(ranks, sleeping | {1: "X"}, 100, awake_since=0, hang_timeout=0, slow_timeout=1800)
    assert died[0].what == "died"


def test_a_debugger_is_no_fault_and_a_stop_is_one_after_ten_seconds():
    ranks = {0: record(5, 3, "backward", 85), 1: record(5, 1, "forward", 85)}
    for letter, expected in (("T", [Fault(1, "stopped", 15)]), ("t", [])):
        assert find_stalled(ranks, {0: "S", 1: letter}, 100, awake_since=0, hang_timeout=25, slow_timeout=1800) == expected
    assert find_stalled(ranks, {0: "S", 1: "T"}, 94, awake_since=0, hang_timeout=25, slow_timeout=1800) == []


def test_a_record_says_where_its_process_is_and_is_removed_when_the_run_succeeds(tmp_path: Path):
    watchdog = Watchdog(tmp_path, 0, range(1), hang_timeout=25, slow_timeout=1800, error_fd=2)
    began = time.perf_counter()
    for step in range(1, 1001):
        for phase in ("reading rows", "forward", "backward"):
            watchdog.enter(phase, step if phase == "reading rows" else None)
    # a few records for each micro batch must cost next to nothing
    assert (time.perf_counter() - began) / 3000 < 50e-6
    stored = read_heartbeat(tmp_path / "ranks", 0)
    assert stored and (stored.pid, stored.position()) == (os.getpid(), "step 1000, backward (micro batch 1)")
    assert process_state(stored) in ("R", "S")
    # a record of another process, whose pid was reused
    assert process_state(record(1, 1, "forward", 0, pid=stored.pid)) == "X"
    watchdog.end(failed=False)
    assert not (tmp_path / "ranks").exists() and read_heartbeat(tmp_path / "ranks", 0) is None


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path: Path):
    watchdog = Watchdog(tmp_path / "gone", 0, range(2), hang_timeout=25, slow_timeout=1800, error_fd=2)
    watchdog.enter("forward", 1)
    watchdog.end(failed=True)


def test_the_main_thread_of_a_dump_and_whether_it_waits_for_others():
    dump = (
        'Thread 0x00007f01 (most recent call first):\n  File "/a/watch.py", line 1 in look\n\n'
        "Current thread 0x00007f02 (most recent call first):\n"
        '  File "/x/torch/distributed/distributed_c10d.py", line 2 in all_reduce\n  File "/x/run.py", line 3 in main\n'
    )
    stack = thread_stack(dump, 0x7F02)
    assert [line.rsplit(" ", 1)[1] for line in stack] == ["all_reduce", "main"] and is_in_collective(stack)
    assert not is_in_collective(thread_stack(dump, 0x7F01)) and thread_stack(dump, 3) == []
