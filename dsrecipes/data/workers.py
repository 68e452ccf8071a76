"""Process a stream of groups on all cores, results in order; a few groups are processed here, without workers."""

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
"""So many groups are processed here: starting workers would take longer."""
_MOST = 32
"""Beyond this number of workers the reading process is the bottleneck."""
_AHEAD = 3
"""Groups a worker that are read ahead: they bound the memory."""
_PR_SET_PDEATHSIG = 1

_function: Callable[[Any], Any]
"""In a worker: what it does with each group."""


def cores() -> int:
    """Workers to start: as many as this process has cores, 1 where processes cannot be forked safely."""
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST)


def in_order(function: Callable[[Group], Result], groups: Iterable[Group], workers: int, few: int = FEW) -> Iterator[Result]:
    """`function` of each group, in order; an error reaches the caller where its result would have.

    Workers are forked, so a function of any module, a notebook's too, and a tokenizer are there without being pickled;
    groups and results are. At most _AHEAD groups for each worker are in flight.

    Raises:
        UserError: a worker was killed.
        Exception: what the function or `groups` raised.
    """
    groups = iter(groups)
    first = list(_guarded(islice(groups, few + 1)))
    if workers < 2 or len(first) <= few:
        for group in chain(first, _guarded(groups)):
            yield function(_checked(group))
        return
    pool = _forked(function, workers)
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
            f"one of {workers} processes that prepare the rows was killed, perhaps for lack of memory. Allow fewer, for "
            "example two: taskset -c 0,1 COMMAND"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class _Failed:
    """An error in the place of a group or of a result."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _guarded(groups: Iterator[Group]) -> Iterator[Group | _Failed]:
    """The groups, and last the error that ended them: rows before it come first, as without workers."""
    try:
        yield from groups
    except Exception as error:
        yield _Failed(error)


def _checked(value: Any) -> Any:
    if isinstance(value, _Failed):
        raise value.error
    return value


def _forked(function: Callable[[Any], Any], workers: int) -> ProcessPoolExecutor:
    """A pool whose processes have started, which they do at the first call."""
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
    """Ctrl-C and signals are the parent's business; a worker ends with it, however it ends."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before prctl
    gc.freeze()  # a collection would write into the pages that are shared with the parent
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # a fork has none of the parent's OpenMP threads, and would wait for them


def _call(group: Any) -> Any:
    try:
        return _function(group)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception that does not survive the way back would break the pool
            error = RuntimeError("".join(traceback.format_exception(error)))
        return _Failed(error)
