"""Each rank records where it stands, and watches the ranks of its machine: killed, stopped or hanging ones are named.

A collective waits for a rank that does not come for 30 minutes (ddp_timeout), and then does not say which one it was.
Only ranks of the same machine are looked at, for process ids mean nothing elsewhere; the others have their own watchers,
and where the run folder is shared, a fault that one machine finds ends the ranks of all.
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

from dsrecipes.errors import RESUME_CODE
from dsrecipes.launch.environment import RUN_FOLDER_FILE
from dsrecipes.launch.heartbeat import (
    ASLEEP,
    FAULT,
    LAYOUT,
    PHASES,
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

_TICK = 0.5
"""Seconds between two looks."""
_NEVER = -1.0


def resume_hint(run: Path | str) -> str:
    """How a run that ended is continued."""
    return f"The same command with --output_dir {run} --resume_from_checkpoint auto goes on from the last checkpoint, if one was saved"


def end_with_launcher() -> None:
    """End this process, as SIGTERM does, when the launcher that started it is gone."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get(RUN_FOLDER_FILE):
        threading.Thread(target=look, name="launcher", daemon=True).start()


class Watchdog:
    """This rank's record, and the thread that looks at the others'."""

    def __init__(self, run: Path, rank: int, mates: range, *, hang: float, patience: float, error_fd: int) -> None:
        """Begin the record at "starting", and watch.

        Args:
            run: the run folder; records lie in its folder `ranks`.
            rank: this process's.
            mates: ranks of this machine, this one among them.
            hang: seconds that a rank may stand still while the others wait; 0: that is not looked at.
            patience: the same for starting, saving, finishing and a phase's first time.
            error_fd: where a person reads errors.
        """
        self.run, self.folder, self.rank, self.mates = run, run / "ranks", rank, mates
        self.hang, self.patience, self.error_fd = hang, patience, error_fd
        self.launched = os.environ.get(RUN_FOLDER_FILE)
        born = process_stat(os.getpid())
        self._who = (host_id(), os.getpid(), born[1] if born else 0, threading.main_thread().ident or 0)
        self._phase, self._step, self._micro, self._count, self._since = 0, 0, 0, 0, time.monotonic()
        self._longest = [_NEVER] * len(PHASES)
        self._done = threading.Event()
        self._file = self._stack_file = -1
        with contextlib.suppress(OSError):  # the training is worth more than its watch
            self.folder.mkdir(exist_ok=True)
            self._file = os.open(self.folder / f"rank_{rank}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            self._stack_file = os.open(self._stack_path(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
            if hasattr(faulthandler, "register") and threading.current_thread() is threading.main_thread():
                faulthandler.register(signal.SIGUSR2, file=self._stack_file, all_threads=True)
            if self.launched and rank == 0:
                Path(self.launched).write_text(str(run.absolute()), "utf-8")
        self._write()
        if len(mates) > 1 and self._file >= 0:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    @staticmethod
    def remove_records(run: Path) -> None:
        """Remove what an earlier start left; on rank 0, before any rank of this start writes its record."""
        shutil.rmtree(run / "ranks", ignore_errors=True)

    def enter(self, phase: str, step: int | None = None) -> None:
        """This rank begins `phase`; every rank must call it in the same order. Takes a few microseconds."""
        now, index = time.monotonic(), PHASES.index(phase)
        longest = self._longest[self._phase]
        self._longest[self._phase] = 0.0 if longest < 0 else max(longest, now - self._since)
        self._count += 1
        if step is not None:
            self._step, self._micro, self._count = step, 0, 0
        if phase in ("forward", "evaluating"):
            self._micro += 1
        self._phase, self._since = index, now
        self._write()

    def end(self, failed: bool) -> None:
        """This rank stops as it should, or has told why; the records of a run that ended well are removed."""
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
        """End this process without a word where `error` only says that another rank has left: that is told elsewhere."""
        words = str(error).lower()
        if len(self.mates) < 2 or not any(name in words for name in ("gloo", "nccl", "connection", "socket")):
            return
        for _ in range(25):  # the watcher ends this process where a rank died
            if any(
                record.ended for rank in self.mates if rank != self.rank and (record := read_heartbeat(self.folder, rank))
            ):
                os._exit(RESUME_CODE)
            time.sleep(0.2)

    def _write(self, ended: bool = False) -> None:
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            place = (self._since, self._step, self._micro, self._count)
            os.pwrite(self._file, LAYOUT.pack(*self._who, self._phase, ended, *place, *self._longest), 0)

    def _stack_path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.stack"

    # ---- the thread ----

    def _watch(self) -> None:
        tick = awake = time.monotonic()
        before: list[tuple[int, str]] = []
        while not self._done.wait(_TICK):
            now = time.monotonic()
            awake, tick = (now if now - tick > ASLEEP else awake), now
            if (self.folder / FAULT).exists():
                self._leave()
            records = {rank: record for rank in self.mates if (record := read_heartbeat(self.folder, rank))}
            records = {r: each for r, each in records.items() if each.host == self._who[0] and not each.ended}
            states = {rank: process_state(record) for rank, record in records.items()}
            faults = find_stalled(records, states, now, awake=awake, hang=self.hang, patience=self.patience)
            seen = [(each.rank, each.what) for each in faults]
            if faults and seen == before:  # twice, for a record may be read while it is written
                self._act(faults, records)
                awake = now  # nobody could be named; look again when as much time has passed
            before = seen

    def _act(self, faults: list[Fault], records: dict[int, Heartbeat]) -> None:
        """Find the one at fault, name it and end the run, if no other watcher does."""
        stacks: dict[int, list[str]] = {}
        if faults[0].what == "hangs":
            stacks = {each.rank: self._stack(records[each.rank], each.rank) for each in faults}
            if len(faults) > 1:
                faults = [each for each in faults if not is_in_collective(stacks[each.rank])]
            if not faults or len(faults) == len(records):
                return  # all wait, or all work: who is at fault cannot be told
        fault = faults[0]
        if fault.rank == self.rank and len(records) > 1:
            return
        innocent = [rank for rank in records if rank != fault.rank]
        time.sleep(0.3 * innocent.index(self.rank) if self.rank in innocent else 0)
        text = self._message(fault, records[fault.rank], stacks.get(fault.rank, []))
        found = json.dumps(vars(fault) | {"text": text})
        try:
            with (self.folder / FAULT).open("x", encoding="utf-8") as file:
                file.write(found)
        except FileExistsError:
            self._leave()
        except OSError:
            pass  # no folder any more: then everyone tells
        if not self.launched:
            with contextlib.suppress(OSError):  # nobody may read it any more
                os.write(self.error_fd, f"\n{text}\n".encode())
        if fault.what != "died":
            with contextlib.suppress(OSError):
                os.kill(records[fault.rank].pid, signal.SIGKILL)
        os._exit(RESUME_CODE)

    def _leave(self) -> NoReturn:
        time.sleep(1)  # who found it has yet to tell
        os._exit(RESUME_CODE)

    def _stack(self, record: Heartbeat, rank: int) -> list[str]:
        """Ask a rank for its main thread's stack, innermost frame first; empty where it gives none."""
        path = self._stack_path(rank)
        try:
            size = path.stat().st_size
            os.kill(record.pid, signal.SIGUSR2)
            for _ in range(10):
                time.sleep(0.1)
                with path.open("rb") as file:
                    file.seek(size)
                    stack = thread_stack(file.read().decode(errors="replace"), record.thread)
                if stack:
                    return stack
        except OSError:
            pass
        return []

    def _message(self, fault: Fault, record: Heartbeat, stack: list[str]) -> str:
        who = f"error: rank {fault.rank} (pid {record.pid})"
        if fault.what == "died":
            why = "died; the system's log may say why (`dmesg`: Out of memory)"
        elif fault.what == "stopped":
            why = f"was stopped (SIGSTOP; `kill -CONT {record.pid}` lets one go on) and gives no stack"
        else:
            why = f"has stood still for {fault.seconds:.0f} s while the others wait for it"
        lines = [f"{who} {why}. Its last place: {record.where()}."]
        if stack:
            lines += ["It stands in (innermost first):", *(f"  {line}" for line in stack[:6])]
        elif fault.what == "hangs":
            lines += ["It gives no stack."]
        if fault.what == "hangs":
            lines += ["Mend what the stack shows; where it is only slow, allow more with --hang_timeout SECONDS (0: off)."]
        return "\n".join([*lines, f"All ranks were ended. {resume_hint(self.run)}."])
