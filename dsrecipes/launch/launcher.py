"""How the ranks of a run are started on this machine, stopped together, and restarted after a failure.

It imports nothing heavy, and never kills a rank that is saving: after SIGTERM it waits for as long as the ranks take.
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

from dsrecipes.errors import EXIT_CODE, RESUME_CODE, coded
from dsrecipes.io.console import leave_unread
from dsrecipes.launch.environment import RUN_FOLDER_FILE, START_TIME
from dsrecipes.launch.heartbeat import read_fault, read_heartbeat
from dsrecipes.launch.host_memory import HostMemory
from dsrecipes.launch.signals import restore_child_signal, should_handle
from dsrecipes.launch.watchdog import resume_hint

_INTERRUPTED = 130
_GRACE = {EXIT_CODE: 0, _INTERRUPTED: 10}
"""Exit code of the first rank that ends -> seconds that the others get; a user's mistake is reported by then."""
_DEFAULT_GRACE = 5
"""Seconds after any other failure: the others may be reporting what they know of it."""
_FORWARDED = {"SIGTERM": "SIGTERM", "SIGINT": "SIGINT", "SIGHUP": "SIGTERM", "SIGUSR1": "SIGUSR1"}
"""Signal that the launcher receives -> signal that it sends to the ranks."""
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


@dataclass
class _Start:
    """One start of all ranks: their processes, and how each has ended."""

    processes: list[subprocess.Popen]
    run_folder_file: Path
    """File in which rank 0 names the run folder."""
    memory: HostMemory = field(default_factory=HostMemory)
    ended: dict[int, int] = field(default_factory=dict)
    """rank -> exit code, in the order of their ends; below 0: killed by that signal."""
    peak_memory: dict[int, int] = field(default_factory=dict)
    """rank -> its greatest resident memory in bytes."""
    stop_signals: list[int] = field(default_factory=list)
    """Forwarded signals that end a run."""
    run: Path | None = None

    @property
    def interrupted_twice(self) -> bool:
        """Whether Ctrl-C came twice: stop without saving."""
        return self.stop_signals.count(signal.SIGINT) > 1

    def folder(self) -> Path | None:
        """The run folder, once it exists; remembered, because a cleaner of /tmp may delete the file that names it."""
        if self.run is None:
            with contextlib.suppress(OSError):
                text = self.run_folder_file.read_text("utf-8")
                self.run = Path(text) if text else None
        return self.run

    def has_fault(self) -> bool:
        """Whether a watchdog has reported a rank."""
        run = self.folder()
        return run is not None and read_fault(run / "ranks") is not None

    def send(self, number: int) -> None:
        """Send a signal to all ranks that are left."""
        for rank, process in enumerate(self.processes):
            if rank not in self.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def collect(self) -> None:
        """Record the ranks that have ended since the last call."""
        for rank, process in enumerate(self.processes):
            if rank in self.ended:
                continue
            # not Popen.poll, which drops how much memory the process used
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                self.ended[rank] = process.returncode = os.waitstatus_to_exitcode(status)
                unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
                self.peak_memory[rank] = usage.ru_maxrss * unit

    def first_failure(self) -> tuple[int, int] | None:
        """Rank and code of the first failure; ranks that left because another one failed (75) count only without it."""
        failures = [(rank, code) for rank, code in self.ended.items() if code]
        for rank, code in failures:
            if code != RESUME_CODE:
                return rank, code
        return failures[0] if failures else None


@contextlib.contextmanager
def _free_port() -> Iterator[str]:
    """Reserve a port until rank 0 listens on it, ten seconds of imports later."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rank 0 sets it too, so both may bind the port
        reserved.bind(("127.0.0.1", 0))
        yield str(reserved.getsockname()[1])


def _environments(ranks: int, port: str) -> list[dict[str, str]]:
    """Environment variables of each rank; a single rank sets its own."""
    # complete_ranks chooses a free port, or the run needs no process group at all
    if ranks == 1:
        return [{}]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # as torchrun does: else each rank has a thread for every core; set_threads divides them later
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return [shared | threads | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@contextlib.contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """The signals that this process receives in the meantime, in order."""
    received: list[int] = []
    previous = {}
    if threading.current_thread() is threading.main_thread():
        restore_child_signal()
        for name in (*_FORWARDED, "SIGTSTP"):
            number = getattr(signal, name)
            if should_handle(number):
                # only collected: what a signal leads to happens in _wait, which may be starting or reaping a rank
                previous[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _forward(start: _Start, number: int) -> None:
    # Ctrl-Z stops the ranks together with this process, and `fg` continues them all
    if number == signal.SIGTSTP:
        start.send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        start.send(signal.SIGCONT)
        return
    number = getattr(signal, _FORWARDED[signal.Signals(number).name])
    if number != signal.SIGUSR1:
        start.stop_signals.append(number)
    start.send(number)


def _wait(start: _Start, received: list[int]) -> None:
    """Wait until all ranks have ended; after a failure the others are killed once their grace period is over."""
    deadline, sampled = float("inf"), 0.0
    while len(start.ended) < len(start.processes):
        while received:
            _forward(start, received.pop(0))
            if start.interrupted_twice:
                deadline = min(deadline, time.monotonic() + _GRACE[_INTERRUPTED])
        start.collect()
        failure = start.first_failure()
        # A rank that ends with 75, and no fault reported, had a signal to save and stop: the others are saving too, for as
        # long as it takes.
        if failure and deadline == float("inf") and (failure[1] != RESUME_CODE or start.has_fault()):
            deadline = time.monotonic() + _GRACE.get(failure[1], _DEFAULT_GRACE)
        if time.monotonic() > deadline:
            start.send(signal.SIGKILL)
        if time.monotonic() > sampled + 1:
            start.memory.sample()
            start.folder()
            sampled = time.monotonic()
        # polled: waiting for one rank would miss the others, and a signal may come at any time
        time.sleep(0.05)


def _run(ranks: int, argv: list[str], run_folder_file: Path, started: str, received: list[int]) -> _Start:
    """Start the ranks, and wait until all have ended."""
    run_folder_file.write_text("")
    command = [sys.executable, "-m", "dsrecipes.run", *argv]
    shared = os.environ | {RUN_FOLDER_FILE: str(run_folder_file), START_TIME: started}
    with _free_port() as port:
        # A session of their own: Ctrl-C on the terminal reaches only the launcher, which forwards it once.
        processes = [
            subprocess.Popen(command, env=shared | own, start_new_session=True) for own in _environments(ranks, port)
        ]
        start = _Start(processes, run_folder_file)
        try:
            _wait(start, received)
        finally:
            # reaches a rank only where this process itself failed
            start.send(signal.SIGKILL)
    return start


def _why_killed(start: _Start, rank: int) -> str:
    """Whether SIGKILL came from the kernel, which kills where memory runs out, or from somebody else."""
    ran_out, figures = start.memory.report()
    peak = f"its memory reached {start.peak_memory[rank] / 1e9:.1f} GB"
    facts = f"{peak}; {figures}" if figures else peak
    if ran_out:
        return (
            f"Host memory ran out: {facts}. Give the job more memory, or start fewer ranks (--procs), drop offload to the "
            "CPU (--deepspeed zero2 or zero3), lower --dataloader_num_workers or --per_device_train_batch_size"
        )
    return f"Memory was not short ({facts}), so someone killed it: a limit of the batch queue, an administrator, `kill -9`"


def _describe_failure(start: _Start, rank: int, code: int) -> str:
    """Message: which rank failed first, how and where, and how to resume."""
    run = start.folder()
    fault = read_fault(run / "ranks") if run else None
    # of a death the launcher knows more than the watchdogs: the signal, and the memory
    if fault and fault[0].what != "died":
        return fault[1]
    pid = start.processes[rank].pid
    record = read_heartbeat(run / "ranks", rank) if run else None
    # a record of another process is from an earlier start
    position = f"at {record.position()}" if record and record.pid == pid else "while it was starting"
    end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = [coded("DSR308", f"error: rank {rank} (pid {pid}) {end} {position}; the others were stopped.")]
    if -code == signal.SIGKILL:
        lines.append(_why_killed(start, rank) + ".")
    elif -code in _CRASHES:
        lines.append("It crashed in compiled code; --verbose true shows what the libraries print.")
    elif code > 0:
        lines.append("Its own message is above.")
    if run:
        restart = "; --max_restarts N does so by itself" if code < 0 else ""
        lines.append(f"{resume_hint(run)}{restart}.")
    return "\n".join(lines)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        leave_unread(2)
        print(text, file=sys.stderr, flush=True)


def _outcome(start: _Start) -> tuple[int, str | None]:
    """Exit code, and a message; None where the ranks have reported it themselves, or have stopped on a signal."""
    failure = start.first_failure()
    if failure is None:
        return 0, None
    rank, code = failure
    # a signal may end a rank before its handlers are installed: as intended, and no failure
    if start.stop_signals:
        first = start.stop_signals[0]
        if -code == first or (start.interrupted_twice and -code == signal.SIGKILL):
            return RESUME_CODE if first == signal.SIGTERM else 128 + first, None
    if code in (EXIT_CODE, _INTERRUPTED) or (code == RESUME_CODE and not start.has_fault()):
        return code, None
    # a killed rank can resume; a rank that ended with a code of its own would probably fail again
    return RESUME_CODE if code < 0 else code, _describe_failure(start, rank, code)


def launch(ranks: int, argv: list[str], restarts: int) -> int:
    """Run `dsrecipes.run ARGV` on ranks of this machine, and restart it from the last checkpoint after a failure.

    Args:
        restarts: how often to restart (--max_restarts).

    Returns:
        0; 2 for a user's mistake; 75 where the same command with --resume_from_checkpoint auto resumes: a rank was
        killed, stopped or hung, or a signal made the run save and stop; else the code of the rank that failed first.
    """
    started = str(time.time())
    temporary = tempfile.TemporaryDirectory(prefix="dsrecipes-launch-", ignore_cleanup_errors=True)
    with temporary as folder, _collect_signals() as received:
        run_folder_file = Path(folder, "run")
        arguments = argv
        for left in range(restarts, -1, -1):
            start = _run(ranks, arguments, run_folder_file, started, received)
            code, message = _outcome(start)
            if message:
                # the cursor may be on the line of a progress bar
                _say(f"\n{message}")
            if not message or not left or start.stop_signals:
                break
            run = start.folder()
            if run:
                # later flags win over the user's: the folder must not be emptied of what it resumes from
                resume = "--resume_from_checkpoint auto --overwrite_output_dir false --output_dir"
                arguments = [*argv, *resume.split(), str(run)]
            source = f", from the last checkpoint in {run}" if run else ""
            _say(f"restart   {restarts - left + 1} of {restarts}{source}")
    return code
