"""Real ranks for tests: worker processes that start once, because importing everything takes ten seconds, and run cases.

A case is the name of a function in tests/support/rank_cases.py. Every rank calls it with the same values and returns the
result to the test.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import socket
import subprocess
import time
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from support.fork_server import Forked, fork_server
from support.reaper import TAG

from dsrecipes import UserError

_IMPORTED_UNDER = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
_GRACE = 20
"""Seconds that the other ranks have to answer once a case has raised on one rank."""


_ports = itertools.cycle(range(20_000 + 100 * (os.getpid() % 100), 30_000))


def free_port() -> int:
    """A port that no other test of this session gets, below those that the kernel gives out by itself."""
    for port in _ports:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


class CaseError(Exception):
    """A case raised anything but UserError, or did not end in time; the message holds every rank's traceback."""


class Ranks:
    """`world` worker processes of one gloo group, started at the first case and restarted after a failure."""

    def __init__(self, world: int, folder: Path) -> None:
        """`folder` gets one log per rank."""
        self.world, self.folder = world, folder
        self.workers: list[tuple[Forked, Connection]] = []

    def run(self, case: str, *, timeout: float = 240, **values: Any) -> list[Any]:
        """Run a case; returns its results, rank 0 first.

        Raises:
            UserError: every rank raised the same one.
            CaseError: a rank raised anything else, died, or did not answer within `timeout` seconds.
        """
        if not self.workers:
            self._start()
        for _, pipe in self.workers:
            pipe.send((case, values))
        try:
            answers = self._answers(timeout)
        except BaseException:  # the test's time is up: a late answer would be taken for the next case's
            self.kill()
            raise
        if all(kind == "result" for kind, _ in answers):
            return [value for _, value in answers]
        if all(kind == "user error" for kind, _ in answers) and len({str(value) for _, value in answers}) == 1:
            raise UserError(answers[0][1])
        self.kill()
        raise CaseError(f"{case}({values})\n" + "\n".join(f"rank {i} {kind}: {v}" for i, (kind, v) in enumerate(answers)))

    def _answers(self, timeout: float) -> list[tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.world:
            open_pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.workers) if rank not in answers}
            ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = open_pipes[pipe]
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    answers[rank] = ("died", self._log_tail(rank))
                if answers[rank][0] != "result":
                    deadline = min(deadline, time.monotonic() + _GRACE)
        for rank in set(range(self.world)) - set(answers):
            self.workers[rank][0].send_signal(signal.SIGUSR1)  # faulthandler writes where it hangs
            time.sleep(0.5)
            answers[rank] = ("did not answer", self._log_tail(rank))
        return [answers[rank] for rank in range(self.world)]

    def _log_tail(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text(errors="replace")[-4000:]

    def _start(self) -> None:
        port = free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank in range(self.world):
            ours, theirs = Pipe()
            env = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")} | _IMPORTED_UNDER | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world),
                "LOCAL_WORLD_SIZE": str(self.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                TAG: os.environ.get(TAG, "").partition("/")[0] + "/",
            }  # fmt: skip
            with (self.folder / f"rank{rank}.log").open("ab") as log:
                process = fork_server(**_IMPORTED_UNDER).start(
                    {"rank": True}, self.folder, env, log.fileno(), log.fileno(), theirs.fileno()
                )
            theirs.close()
            self.workers.append((process, ours))

    def kill(self) -> None:
        """Kill the workers."""
        for process, pipe in self.workers:
            process.kill()
            pipe.close()
        self.workers = []

    def stop(self) -> None:
        """Let the workers destroy their process group and end."""
        for _, pipe in self.workers:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process, _ in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        self.kill()


def work(pipe: Connection) -> None:
    """A worker: run cases until it is told to stop, or until the test session has ended."""
    from dsrecipes.zero.process import end_process_group

    cases = importlib.import_module("support.rank_cases")
    with contextlib.suppress(EOFError):
        while (request := pipe.recv()) is not None:
            case, values = request
            try:
                answer = ("result", getattr(cases, case)(**values))
            except UserError as error:
                answer = ("user error", str(error))
            except BaseException:
                answer = ("raised", traceback.format_exc())
            pipe.send(answer)
    end_process_group()
