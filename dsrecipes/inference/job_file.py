"""A file of JSON lines that a killed job goes on from: its first line says what the job is, the others what is done."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from dsrecipes.errors import UserError

Json = dict[str, Any]
_FIRST = b'{"kind": "job"'
"""Every such file begins with this, and no other file is touched."""


class ResumableJsonl(ABC):
    """The lines of one job, from earlier calls and this one; while it is open no other process writes the file.

    A line is on the disk before `take` is given it. A last line that a kill tore is cut off.
    """

    def __init__(self, path: Path | None, command: str, job: Json, about: Json | None = None) -> None:
        """Nothing is read or written yet.

        Args:
            path: the file; None keeps the lines in memory alone.
            command: the name of the command that writes it, for messages.
            job: what must be the same for an earlier call's lines to count.
            about: what the first line says beside it, and may change.
        """
        self.path, self.command, self.about = path, command, about or {}
        self.job: Json = json.loads(json.dumps(job))
        self._lock = FileLock(f"{path}.lock", timeout=0)

    @abstractmethod
    def take(self, line: Json) -> None:
        """A line that is on the disk; KeyError or TypeError where it is not of this file's kind."""

    def __enter__(self) -> Self:
        """Take the lines that are there, or begin the file.

        Raises:
            UserError: another process writes it, it is of another job, damaged or none of ours, or it cannot be written.
        """
        if self.path is None:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._read(self.path)
        except Timeout:
            raise UserError(
                f"{self.path}: another `dsrecipes {self.command}` is writing it; wait for it, or name another --out"
            ) from None
        except OSError as error:
            self.__exit__()
            raise self._unwritable(error) from error
        except UserError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _read(self, path: Path) -> None:
        found = path.read_bytes() if path.exists() else b""
        if found[: len(_FIRST)] != _FIRST[: len(found)]:
            raise self._not_ours(1)
        whole = found[: found.rfind(b"\n") + 1]
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
                if number == 1:
                    self._refuse_other(line)
                else:
                    self.take(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise self._not_ours(number) from None
        if len(whole) < len(found):
            os.truncate(path, len(whole))
        if not whole:
            self._write(path, [{"kind": "job", **self.about, **self.job}])

    def _refuse_other(self, first: Json) -> None:
        names = [name for name in {**first, **self.job} if name != "kind" and name not in self.about]
        told = "; ".join(
            _told(name, first.get(name), self.job.get(name)) for name in names if first.get(name) != self.job.get(name)
        )
        if told:
            raise UserError(
                f"{self.path}: holds another job ({told}): give the same again, name another --out, or delete this file"
            )

    def append(self, *lines: Json) -> None:
        """Keep more lines.

        Raises:
            UserError: they cannot be written; what is there stays.
        """
        if self.path is not None:
            self._write(self.path, lines)
        for line in lines:
            self.take(line)

    def _write(self, path: Path, lines: Iterable[Json]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json_lines(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written ({error.strerror}); mend that, and the same command goes on")

    def _not_ours(self, number: int) -> UserError:
        return UserError(
            f"{self.path}, line {number}: damaged, or not written by `dsrecipes {self.command}`; name another --out, or "
            "delete this file to start anew"
        )


def text_in(line: Json, name: str) -> str:
    """A text of a line (KeyError, TypeError: there is none)."""
    if not isinstance(line[name], str):
        raise TypeError(name)
    return line[name]


def _told(name: str, was: Any, now: Any) -> str:
    """A difference in words; a hash says nothing to a person."""
    long = any(isinstance(value, str) and len(value) == 64 for value in (was, now))
    return f"the {name} changed" if long else f"{name}: {was} there, {now} now"


def hash_of(value: Any) -> str:
    """What stands in a job for a value that is too long to be told."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def json_lines(rows: Iterable[Json]) -> str:
    """Rows as the text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
