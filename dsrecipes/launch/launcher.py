"""Starts the ranks of a run on this machine, passes signals on, says why one failed, and starts them again.

It imports nothing heavy, and ends no rank that is saving: after SIGTERM it waits for as long as the ranks take.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dsrecipes.errors import EXIT_CODE, RESUME_CODE
from dsrecipes.io.console import leave_unread
from dsrecipes.launch.environment import RUN_FOLDER_FILE, START_TIME
from dsrecipes.launch.heartbeat import read_fault, read_heartbeat
from dsrecipes.launch.host_memory import HostMemory
from dsrecipes.launch.signals import restore_child_signal, should_handle
from dsrecipes.launch.watchdog import resume_hint

_INTERRUPTED = 130
_GRACE = {EXIT_CODE: 0, _INTERRUPTED: 10}
"""Exit code of the first rank that ends -> seconds that the others have; a user's mistake is told by then."""
_OTHERWISE = 5
"""Seconds after any other failure: the others may be saying what they know of it."""
_PASSED_ON = {"SIGTERM": "SIGTERM", "SIGINT": "SIGINT", "SIGHUP": "SIGTERM", "SIGUSR1": "SIGUSR1"}
"""What the launcher is told -> what it tells the ranks."""


@dataclass
class _Start:
    """One start of all ranks: their processes, and how each has ended."""

    processes: list[subprocess.Popen]
    told: Path
    """Where rank 0 writes the run folder."""
    memory: HostMemory = field(default_factory=HostMemory)
    ended: dict[int, int] = field(default_factory=dict)
    """rank -> exit code, first one first; below 0: killed by that signal."""
    peak: dict[int, int] = field(default_factory=dict)
    """rank -> its greatest resident memory in bytes."""
    asked: list[int] = field(default_factory=list)
    """Signals passed on that end a run."""
    run: Path | None = None

    @property
    def hurried(self) -> bool:
        """Whether the ranks were told twice to leave now."""
        return self.asked.count(signal.SIGINT) > 1

    def folder(self) -> Path | None:
        """The run folder, once there is one; kept, for a cleaner of /tmp may take what tells it."""
        if self.run is None:
            with contextlib.suppress(OSError):
                text = self.told.read_text("utf-8")
                self.run = Path(text) if text else None
        return self.run

    def send(self, number: int) -> None:
        """A signal to all ranks that are left."""
        for rank, process in enumerate(self.processes):
            if rank not in self.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def collect(self) -> None:
        """Note the ranks that have ended since."""
        for rank, process in enumerate(self.processes):
            if rank in self.ended:
                continue
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                self.ended[rank] = process.returncode = os.waitstatus_to_exitcode(status)
                self.peak[rank] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def first_failure(self) -> tuple[int, int] | None:
        """Rank and code of the first that failed; who left because another one failed (75) comes after that one."""
        failed = [(rank, code) for rank, code in self.ended.items() if code]
        return next((each for each in failed if each[1] != RESUME_CODE), failed[0] if failed else None)


@contextlib.contextmanager
def _free_port() -> Iterator[str]:
    """A port that nobody else is given until rank 0 listens on it, ten seconds of imports later."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rank 0 does, which may so bind it as well
        held.bind(("127.0.0.1", 0))
        yield str(held.getsockname()[1])


def _environments(ranks: int, port: str) -> list[dict[str, str]]:
    """What tells each rank its place; one rank alone finds its own."""
    if ranks == 1:
        return [{}]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return [shared | threads | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that come meanwhile, in order."""
    received: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        restore_child_signal()
        for name in (*_PASSED_ON, "SIGTSTP"):
            number = getattr(signal, name)
            if should_handle(number):
                before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(start: _Start, number: int) -> None:
    if number == signal.SIGTSTP:  # Ctrl-Z stops the ranks with this process, and `fg` lets both go on
        start.send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        start.send(signal.SIGCONT)
        return
    number = getattr(signal, _PASSED_ON[signal.Signals(number).name])
    if number != signal.SIGUSR1:
        start.asked.append(number)
    start.send(number)


def _wait(start: _Start, received: list[int]) -> None:
    """Until all ranks have ended; when one fails, the others are killed after their grace."""
    deadline, seen = float("inf"), 0.0
    while len(start.ended) < len(start.processes):
        while received:
            _pass_on(start, received.pop(0))
            if start.hurried:
                deadline = min(deadline, time.monotonic() + _GRACE[_INTERRUPTED])
        start.collect()
        failure = start.first_failure()
        if failure and deadline == float("inf"):
            run = start.folder()
            if failure[1] != RESUME_CODE or (run and read_fault(run / "ranks")):
                deadline = time.monotonic() + _GRACE.get(failure[1], _OTHERWISE)
        if time.monotonic() > deadline:
            start.send(signal.SIGKILL)
        if time.monotonic() > seen + 1:
            start.memory.look()
            start.folder()
            seen = time.monotonic()
        time.sleep(0.05)


def _run(ranks: int, argv: list[str], told: Path, began: str, received: list[int]) -> _Start:
    """Start the ranks and wait until all have ended."""
    told.write_text("")
    with _free_port() as port:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "dsrecipes.run", *argv], env=os.environ | {RUN_FOLDER_FILE: str(told), START_TIME: began} | env,
                start_new_session=True,  # Ctrl-C on the terminal is for the launcher, which passes it on once
            )
            for env in _environments(ranks, port)
        ]  # fmt: skip
        start = _Start(processes, told)
        try:
            _wait(start, received)
        finally:
            start.send(signal.SIGKILL)  # only where this process itself failed
    return start


def _why_killed(start: _Start, rank: int) -> str:
    ran_out, figures = start.memory.report()
    grown = f"its memory reached {start.peak[rank] / 1e9:.1f} GB{'; ' if figures else ''}{figures}"
    if ran_out:
        return (
            f"Host memory ran out: {grown}. Give the job more memory, or start fewer ranks (--procs), drop offload to the "
            "CPU (--deepspeed zero2 or zero3), lower --dataloader_num_workers or --per_device_train_batch_size"
        )
    return f"Memory was not short ({grown}), so someone killed it: a limit of the batch queue, an administrator, `kill -9`"


def _describe(start: _Start, rank: int, code: int) -> str:
    """Who failed first, how and where, and how to go on."""
    run = start.folder()
    found = read_fault(run / "ranks") if run else None
    if found and found[0].what != "died":
        return found[1]
    record = read_heartbeat(run / "ranks", rank) if run else None
    where = f"at {record.where()}" if record and record.pid == start.processes[rank].pid else "while it was starting"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = [f"error: rank {rank} (pid {start.processes[rank].pid}) {how} {where}; the others were stopped."]
    if -code == signal.SIGKILL:
        lines.append(_why_killed(start, rank) + ".")
    elif -code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL):
        lines.append("It crashed in compiled code; --verbose true shows what the libraries print.")
    elif code > 0:
        lines.append("Its own message is above.")
    if run:
        lines.append(f"{resume_hint(run)}{'; --max_restarts N does so by itself' if code < 0 else ''}.")
    return "\n".join(lines)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        leave_unread(2)
        print(text, file=sys.stderr, flush=True)


def _outcome(start: _Start) -> tuple[int, str | None]:
    """The exit code, and what there is to say of a failure; nothing of what the ranks have said, or were asked to do."""
    failure = start.first_failure()
    if failure is None:
        return 0, None
    rank, code = failure
    if start.asked and (-code == start.asked[0] or (start.hurried and -code == signal.SIGKILL)):
        return RESUME_CODE if start.asked[0] == signal.SIGTERM else 128 + start.asked[0], None
    run = start.folder()
    if code in (EXIT_CODE, _INTERRUPTED) or (code == RESUME_CODE and not (run and read_fault(run / "ranks"))):
        return code, None
    return RESUME_CODE if code < 0 else code, _describe(start, rank, code)


def launch(ranks: int, argv: list[str], restarts: int) -> int:
    """Run `dsrecipes.run ARGV` on ranks of this machine, and again from the last checkpoint after a failure.

    Returns:
        0; 2 for a user's mistake; 75 where the same command with --resume_from_checkpoint auto goes on: a rank was
        killed, stopped or hung, or the run was told to save and leave; else the code of the rank that failed first.
    """
    began = str(time.time())
    own = tempfile.TemporaryDirectory(prefix="dsrecipes-launch-", ignore_cleanup_errors=True)
    with own as folder, _signals() as received:
        told = Path(folder, "run")
        words = argv
        for left in range(restarts, -1, -1):
            start = _run(ranks, words, told, began, received)
            code, message = _outcome(start)
            if message:
                _say(f"\n{message}")  # below a progress bar
            if not message or not left or start.asked:
                break
            run = start.folder()
            if run:
                words = [
                    *argv,
                    "--resume_from_checkpoint",
                    "auto",
                    "--overwrite_output_dir",
                    "false",
                    "--output_dir",
                    str(run),
                ]
            _say(f"restart   {restarts - left + 1} of {restarts}{f', from the last checkpoint in {run}' if run else ''}")
    return code
