"""How a rank's death is noticed: each rank records its progress and watches the ranks of its machine.

A collective waits 30 minutes (ddp_timeout) for a rank that does not come, and then does not say which one it was. A
watchdog names a rank that was killed, was stopped or hangs within seconds, and ends the run. It looks only at ranks of
its own machine, since process ids mean nothing elsewhere; each machine has its own watchdogs, and where the run folder is
shared, a fault that one machine finds ends the ranks of all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import NoReturn

from dsrecipes.errors import RESUME_CODE, coded
from dsrecipes.launch.environment import RUN_FOLDER_FILE
from dsrecipes.launch.heartbeat import (
    FAULT,
    LAYOUT,
    PHASES,
    SUSPENDED_SECONDS,
    Fault,
    Heartbeat,
    find_stalled,
    host_id,
    is_in_collective,
    process_stat,
    process_state,
    read_heartbeat,
    thread_stack,
)

_INTERVAL = 0.5
"""Seconds between two checks."""
_NOT_COMPLETED = -1.0


def resume_hint(run: Path | str) -> str:
    """How a run that ended early is resumed."""
    return (
        f"The same command with --output_dir {run} --resume_from_checkpoint auto resumes from the last checkpoint, if one was "
        "saved"
    )


def end_with_launcher() -> None:
    """End this process, as SIGTERM does, when the launcher that started it has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        # SIGTERM and not _exit: the run saves first, as if its batch queue had ended it
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get(RUN_FOLDER_FILE):
        threading.Thread(target=watch, name="launcher", daemon=True).start()


class Watchdog:
    """This rank's heartbeat, and the thread that checks the other ranks'."""

    def __init__(
        self, run: Path, rank: int, local_ranks: range, *, hang_timeout: float, slow_timeout: float, error_fd: int
    ) -> None:
        """Record "starting", and start the thread.

        Args:
            run: the run folder; records are in its folder `ranks`.
            rank: of this process.
            local_ranks: ranks of this machine, including this one.
            hang_timeout: seconds without progress while the others wait; 0: hanging is not checked.
            slow_timeout: the same for starting, saving, finishing and a phase's first time.
            error_fd: file descriptor for messages to the user.
        """
        self.run, self.folder, self.rank, self.local_ranks = run, run / "ranks", rank, local_ranks
        self.hang_timeout, self.slow_timeout, self.error_fd = hang_timeout, slow_timeout, error_fd
        # with our launcher, the launcher prints the message; without it, the first watchdog does
        self.run_folder_file = os.environ.get(RUN_FOLDER_FILE)
        stat = process_stat(os.getpid())
        self._identity = (host_id(), os.getpid(), stat[1] if stat else 0, threading.main_thread().ident or 0)
        self._phase, self._step, self._micro_batch, self._count, self._since = 0, 0, 0, 0, time.monotonic()
        self._longest = [_NOT_COMPLETED] * len(PHASES)
        self._done = threading.Event()
        self._file = self._stack_file = -1
        with contextlib.suppress(OSError):  # training continues without a watchdog where the folder cannot be written
            self._open_files()
        self._write()
        if len(local_ranks) > 1 and self._file >= 0:
            # a daemon: it must not keep a process alive that has ended its work
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _open_files(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._file = os.open(self.folder / f"rank_{self.rank}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self._stack_file = os.open(self._stack_path(self.rank), flags, 0o644)
        # the dump is written by the signal handler in C, and so also while the main thread hangs in a collective
        if hasattr(faulthandler, "register") and threading.current_thread() is threading.main_thread():
            faulthandler.register(signal.SIGUSR2, file=self._stack_file, all_threads=True)
        if self.run_folder_file and self.rank == 0:
            Path(self.run_folder_file).write_text(str(self.run.absolute()), "utf-8")

    @staticmethod
    def remove_records(run: Path) -> None:
        """Remove the records of an earlier start; rank 0 calls it before any rank of this start writes its own."""
        shutil.rmtree(run / "ranks", ignore_errors=True)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Record that this rank begins `phase` (a few microseconds); all ranks must call it in the same order.

        Args:
            step: number of the step that begins with this phase, from 1.
        """
        now, index = time.monotonic(), PHASES.index(phase)
        longest = self._longest[self._phase]
        # The first time of a phase is not typical: it compiles, allocates, fills caches.
        self._longest[self._phase] = 0.0 if longest < 0 else max(longest, now - self._since)
        self._count += 1
        if step is not None:
            self._step, self._micro_batch, self._count = step, 0, 0
        if phase in ("forward", "evaluating"):
            self._micro_batch += 1
        self._phase, self._since = index, now
        self._write()

    def end(self, failed: bool) -> None:
        """Record that this rank ends as intended, or has reported why it fails; a successful run's records are removed."""
        self._done.set()
        self._write(ended=True)
        if self._file < 0:
            return
        if hasattr(faulthandler, "unregister"):
            faulthandler.unregister(signal.SIGUSR2)
        with contextlib.suppress(OSError):
            os.close(self._file)
            os.close(self._stack_file)
            if not failed:
                self._stack_path(self.rank).unlink()
                (self.folder / f"rank_{self.rank}").unlink()
                self.folder.rmdir()
        self._file = -1

    def exit_if_peer_left(self, error: BaseException) -> None:
        """End this process silently where `error` only says that another rank has left, which reports the reason itself."""
        # torch has no error of its own for a peer that has left; gloo, NCCL and the socket store name themselves
        text = str(error).lower()
        if len(self.local_ranks) < 2 or not any(name in text for name in ("gloo", "nccl", "connection", "socket")):
            return
        # five seconds: where a rank died, the watchdog's thread ends this process within that time
        for _ in range(25):
            records = (read_heartbeat(self.folder, rank) for rank in self.local_ranks if rank != self.rank)
            if any(record.ended for record in records if record):
                os._exit(RESUME_CODE)
            time.sleep(0.2)

    def _write(self, ended: bool = False) -> None:
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            position = (self._since, self._step, self._micro_batch, self._count)
            # one call of the kernel, so that a reader sees the old record or the new one but rarely a mixture
            os.pwrite(self._file, LAYOUT.pack(*self._identity, self._phase, ended, *position, *self._longest), 0)

    def _stack_path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.stack"

    # ---- the thread ----

    def _watch(self) -> None:
        checked = awake_since = time.monotonic()
        previous: list[tuple[int, str]] = []
        while not self._done.wait(_INTERVAL):
            now = time.monotonic()
            # a suspended laptop or a stopped job stops the clocks of all ranks, and none of them hangs
            if now - checked > SUSPENDED_SECONDS:
                awake_since = now
            checked = now
            if (self.folder / FAULT).exists():
                self._exit_after_report()
            records = self._read_records()
            states = {rank: process_state(record) for rank, record in records.items()}
            faults = find_stalled(
                records,
                states,
                now,
                awake_since=awake_since,
                hang_timeout=self.hang_timeout,
                slow_timeout=self.slow_timeout,
            )
            current = [(fault.rank, fault.what) for fault in faults]
            if faults and current == previous:  # seen twice, since a record may be read while it is written
                self._handle(faults, records)
                awake_since = now  # nobody could be blamed: check again after as much time
            previous = current

    def _read_records(self) -> dict[int, Heartbeat]:
        """Records of this machine's ranks that have not ended."""
        records = {rank: read_heartbeat(self.folder, rank) for rank in self.local_ranks}
        return {
            rank: record
            for rank, record in records.items()
            if record and record.host == self._identity[0] and not record.ended
        }

    def _handle(self, faults: list[Fault], records: dict[int, Heartbeat]) -> None:
        """Find the rank at fault, report it and end the run, unless another watchdog does."""
        stacks: dict[int, list[str]] = {}
        if faults[0].what == "hangs":
            stacks = {fault.rank: self._request_stack(records[fault.rank], fault.rank) for fault in faults}
            if len(faults) > 1:
                faults = [fault for fault in faults if not is_in_collective(stacks[fault.rank])]
            if not faults or len(faults) == len(records):
                # all wait, or all compute: it is not clear which rank is at fault
                return
        fault = faults[0]
        # the others report it, and end this process
        if fault.rank == self.rank and len(records) > 1:
            return
        # One after the other, so that usually the first one reports and the rest find its file.
        others = [rank for rank in records if rank != fault.rank]
        time.sleep(0.3 * others.index(self.rank) if self.rank in others else 0)
        self._report(fault, self._message(fault, records[fault.rank], stacks.get(fault.rank, [])))
        # a rank that hangs or is stopped would keep its GPU, and does not react to SIGTERM
        if fault.what != "died":
            with contextlib.suppress(OSError):
                os.kill(records[fault.rank].pid, signal.SIGKILL)
        # not sys.exit, which would end this thread alone while the main thread waits in a collective
        os._exit(RESUME_CODE)

    def _report(self, fault: Fault, message: str) -> None:
        """Claim the fault by creating its file, and print the message unless the launcher does."""
        try:
            # mode x creates the file or fails, so that one watchdog alone claims the fault
            with (self.folder / FAULT).open("x", encoding="utf-8") as file:
                file.write(json.dumps(vars(fault) | {"text": message}))
        except FileExistsError:
            self._exit_after_report()
        except OSError:
            pass  # the folder is gone: then every watchdog reports
        if not self.run_folder_file:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(self.error_fd, f"\n{message}\n".encode())

    def _exit_after_report(self) -> NoReturn:
        time.sleep(1)  # the watchdog that found the fault may still be printing it
        os._exit(RESUME_CODE)

    def _request_stack(self, record: Heartbeat, rank: int) -> list[str]:
        """Request the stack of a rank's main thread, innermost frame first; empty where it does not answer in a second."""
        path = self._stack_path(rank)
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            os.kill(record.pid, signal.SIGUSR2)
            for _ in range(10):
                time.sleep(0.1)
                with path.open("rb") as file:
                    file.seek(size)
                    stack = thread_stack(file.read().decode(errors="replace"), record.thread)
                if stack:
                    return stack
        return []

    def _message(self, fault: Fault, record: Heartbeat, stack: list[str]) -> str:
        if fault.what == "died":
            reason = "died; the system's log may say why (`dmesg`: Out of memory)"
        elif fault.what == "stopped":
            reason = f"was stopped (SIGSTOP; `kill -CONT {record.pid}` continues it) and gives no stack"
        else:
            reason = f"has made no progress for {fault.seconds:.0f} s and blocks the other ranks"
        first = f"error: rank {fault.rank} (pid {record.pid}) {reason}. Last phase: {record.position()}."
        lines = [coded("DSR309", first)]
        if stack:
            lines += ["Its stack (innermost first):", *(f"  {line}" for line in stack[:6])]
        elif fault.what == "hangs":
            lines.append("It gives no stack.")
        if fault.what == "hangs":
            lines.append("Fix what the stack shows; where it is only slow, raise --hang_timeout SECONDS (0: off).")
        return "\n".join([*lines, f"All ranks were ended. {resume_hint(self.run)}."])
