"""How are rows prepared on all cores? A pool of forked processes that returns results in order.

Forked, because workers then have the recipe (of any module, a notebook's too) and the tokenizer without pickling them. A small
number of groups is processed in this process, because starting workers would take longer.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from dsrecipes.errors import UserError

Group = TypeVar("Group")
Result = TypeVar("Result")

FEW = 8
"""Groups that are processed without workers."""
_MOST = 32
"""Upper limit of workers: with more, the process that reads is the bottleneck."""
_AHEAD = 3
"""Groups for each worker that are read ahead; a bound on memory."""
_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that the kernel sends when the parent ends."""

_function: Callable[[Any], Any]
"""In a worker process: what it does with each group."""


def cores() -> int:
    """Return the number of workers to start: the cores of this process, or 1 where processes cannot be forked safely."""
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST)


def in_order(function: Callable[[Group], Result], groups: Iterable[Group], workers: int, few: int = FEW) -> Iterator[Result]:
    """Yield `function` of each group, in order; an error is raised where its result would have been.

    Groups and results are pickled. At most _AHEAD groups for each worker are in flight.

    Args:
        function: of one group.
        groups: an error while they are read is raised after the results of the groups before it.
        workers: processes to start; 1 processes everything here.
        few: number of groups up to which no workers are started.

    Raises:
        UserError: a worker was killed.
        Exception: what `function` or `groups` raised.
    """
    groups = iter(groups)
    first = list(_guarded(islice(groups, few + 1)))
    if workers < 2 or len(first) <= few:
        for group in chain(first, _guarded(groups)):
            yield function(_checked(group))
        return
    pool = _forked(function, workers)
    # a queue in the order of the groups, because pool.map would read all groups before the first result
    pending: deque[Future] = deque()
    try:
        for group in chain(first, _guarded(groups)):
            pending.append(_submit(pool, group))
            if len(pending) > _AHEAD * workers:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    except BrokenProcessPool:
        raise UserError(
            "DSR105",
            f"one of {workers} processes that prepare the rows was killed, perhaps for lack of memory. Allow fewer, for "
            "example two: taskset -c 0,1 COMMAND",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class _Failed:
    """Takes the place of a group or a result where there was an error.

    Errors travel as values, so that they are raised after the results before them and not when a worker meets them.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error


def _guarded(groups: Iterator[Group]) -> Iterator[Group | _Failed]:
    """Yield the groups, and last the error that ended them, so that the groups before it are processed first."""
    try:
        yield from groups
    except Exception as error:
        yield _Failed(error)


def _checked(value: Any) -> Any:
    """Return a value, or raise the error that it represents."""
    if isinstance(value, _Failed):
        raise value.error
    return value


def _forked(function: Callable[[Any], Any], workers: int) -> ProcessPoolExecutor:
    """Start a pool; the first call makes it fork its processes."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (function, os.getpid()))
    # the tokenizers library must not use threads of its own in a fork, and warns where it had some before
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        pool.submit(int)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return pool


def _submit(pool: ProcessPoolExecutor, group: Any) -> Future:
    if not isinstance(group, _Failed):
        return pool.submit(_call, group)
    failed: Future = Future()
    failed.set_result(group)
    return failed


def _result(future: Future) -> Any:
    return _checked(future.result())


# ---- in a worker ----


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    """Set up a worker: it ignores Ctrl-C, which the parent handles, and dies with the parent, however that ends."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a run's own handler raises SystemExit, which the pool would send back as the result of a group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before prctl
    gc.freeze()  # garbage collection would write into the pages that are shared with the parent
    if "torch" in sys.modules:
        # a fork does not have the OpenMP threads of its parent, and would wait for them
        sys.modules["torch"].set_num_threads(1)


def _call(group: Any) -> Any:
    try:
        return _function(group)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception that cannot be unpickled would break the pool
            error = RuntimeError("".join(traceback.format_exception(error)))
        return _Failed(error)
