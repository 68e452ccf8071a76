"""Worker processes: results in order, errors in the position of their result, no process left running."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsrecipes.data.workers import in_order
from dsrecipes.errors import UserError


class TwoParts(Exception):
    """Cannot be unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def numbers(stop, error=None):
    yield from range(stop)
    if error:
        raise error


def slow_first(number):
    time.sleep(0.05 if number % 4 == 0 else 0)
    return number, os.getpid()


def test_results_come_in_order_from_several_processes():
    results = list(in_order(slow_first, numbers(40), workers=3, few=2))
    assert [number for number, _ in results] == list(range(40))
    assert len({pid for _, pid in results}) > 1 and os.getpid() not in {pid for _, pid in results}
    assert not multiprocessing.active_children()


def test_few_groups_are_processed_here():
    assert {pid for _, pid in in_order(slow_first, numbers(3), workers=3, few=3)} == {os.getpid()}
    assert {pid for _, pid in in_order(slow_first, numbers(9), workers=1, few=3)} == {os.getpid()}


def test_groups_are_read_only_so_far_ahead():
    taken = []
    results = in_order(lambda number: number, (taken.append(n) or n for n in range(1000)), workers=2, few=2)
    for _ in range(100):
        next(results)
    assert len(taken) < 120
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("error", "kind", "message"), [
    (UserError("row 7"), UserError, "row 7"), (KeyError("x"), KeyError, "x"),
    (TwoParts("one", "two"), (TwoParts, RuntimeError), "one and two"),
])  # fmt: skip
def test_an_error_comes_after_the_results_before_it(workers, error, kind, message):
    def fails(number):
        if number == 7:
            raise error
        return number

    seen = []
    with pytest.raises(kind, match=message):
        seen.extend(in_order(fails, numbers(40), workers, few=2))
    assert seen == list(range(7))
    seen.clear()
    with pytest.raises(kind, match=message):  # while reading
        seen.extend(in_order(abs, numbers(20, error), workers, few=2))
    assert seen == list(range(20)) and not multiprocessing.active_children()


def test_a_killed_worker_is_an_error():
    def dies(number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match="DSR105"):
        list(in_order(dies, numbers(40), workers=2, few=2))
    assert not multiprocessing.active_children()


SCRIPT = """
import os, sys, time
from dsrecipes.data.workers import in_order

def work(number):
    print(os.getpid(), flush=True)
    time.sleep(0.2)

for _ in in_order(work, iter(range(1000)), 2, few=1):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(number):
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    workers = {int(process.stdout.readline()) for _ in range(4)}
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -number
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
