"""Results that outlive a kill: appended to OUT.partial as they come, and put in order into OUT at the end."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import IO, Any, Self

from filelock import FileLock, Timeout

from dsrecipes.errors import UserError

Json = dict[str, Any]


class Partial:
    """Answers by index; with an `out`, those of an earlier call of the same job are there already.

    The first line of OUT.partial says what defines the job. Without an `out` nothing is written.
    """

    def __init__(self, out: Path | None, job: Json) -> None:
        self.out, self.job = out, job
        self.done: dict[int, str] = {}
        self._file: IO[str] | None = None
        if out is not None:
            self.path = out.with_name(f"{out.name}.partial")
            self._lock = FileLock(f"{self.path}.lock", timeout=0)

    def __enter__(self) -> Self:
        """Read what is there, and open it for more.

        Raises:
            UserError: another process writes it, it belongs to another job, or it cannot be written.
        """
        if self.out is None:
            return self
        try:
            self._lock.acquire()
            whole = self._read() if self.path.exists() else 0
            self._file = self.path.open("a", encoding="utf-8")
            self._file.truncate(whole)
            if not whole:
                self._append([{"job": self.job}])
        except Timeout:
            raise UserError(f"{self.path}: another process is writing these answers; wait for it, or end it") from None
        except OSError as error:
            self._release()
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        except UserError:
            self._release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.out is not None:
            self._release()

    def _release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, which was told when it was met
                self._file.close()
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _read(self) -> int:
        """Take the answers over; returns how many bytes are whole lines (a kill may have torn the last)."""
        whole = self.path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        try:
            job, *answers = [json.loads(line) for line in whole.splitlines()] or [None]
            if job is not None:
                self._refuse_other(job["job"])
            self.done = {each["index"]: each["answer"] for each in answers}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: damaged ({error}); delete it to start anew") from None
        return len(whole)

    def _refuse_other(self, job: Json) -> None:
        changed = [name for name in {**job, **self.job} if job.get(name) != self.job.get(name)]
        if changed:
            told = "; ".join(_told(name, job.get(name), self.job.get(name)) for name in changed)
            raise UserError(
                f"{self.path} was begun as another job ({told}): give the same again, or delete it to start anew"
            )

    def add(self, answers: dict[int, str]) -> None:
        """Keep a batch of answers, on the disk before this returns."""
        self.done |= answers
        self._append([{"index": index, "answer": answer} for index, answer in answers.items()])

    def _append(self, rows: list[Json]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(_lines(rows))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); mend that, and the same call goes on"
            ) from error

    def finish(self, rows: list[Json]) -> None:
        """Write the rows to OUT by way of a file beside it, and remove OUT.partial."""
        if self.out is None:
            return
        beside = self.out.with_name(f"{self.out.name}.writing")
        try:
            beside.write_text(_lines(rows), encoding="utf-8")
            beside.rename(self.out)
        except OSError as error:
            raise UserError(
                f"{self.out}: cannot be written ({error.strerror}); mend that, and the same call goes on"
            ) from error
        self.path.unlink()


def _told(name: str, was: Any, now: Any) -> str:
    long = any(isinstance(value, str) and len(value) == 64 for value in (was, now))
    return f"the {name} changed" if long else f"{name}: {was} there, {now} now"


def _lines(rows: list[Json]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
