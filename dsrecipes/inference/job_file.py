"""How does a killed job resume? A file of JSON lines: the first says what the job is, the others what is done."""

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
"""Beginning of every such file; a file that begins otherwise is not touched."""


class ResumableJsonl(ABC):
    """The lines of one job, from earlier calls and this one; while it is open no other process writes the file.

    A line is on the disk before `load_line` gets it, so what a caller has seen survives a kill. A last line that a kill cut
    short is removed.
    """

    def __init__(self, path: Path | None, command: str, job: Json, about: Json | None = None) -> None:
        """Nothing is read or written yet.

        Args:
            path: the file; None keeps the lines in memory alone.
            command: the name of the command that writes it, for messages.
            job: what must be the same for an earlier call's lines to count.
            about: what the first line says too, and may change.
        """
        self.path, self.command, self.about = path, command, about or {}
        # As it will be read back: tuples become lists, and the comparison must not see a difference.
        self.job: Json = json.loads(json.dumps(job))
        # No waiting: the other process may run for hours, so the second command is refused.
        self._lock = FileLock(f"{path}.lock", timeout=0)

    @abstractmethod
    def load_line(self, line: Json) -> None:
        """Take a line that is on the disk; KeyError or TypeError where it is not of this file's kind."""

    def __enter__(self) -> Self:
        """Load the lines that exist, or begin the file.

        Raises:
            UserError: another process writes it, it is of another job or damaged, or it cannot be written.
        """
        if self.path is None:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._read(self.path)
        except Timeout:
            raise UserError(
                "DSR436",
                f"{self.path}: another `dsrecipes {self.command}` is writing it; wait for it, or name another --out",
            ) from None
        except OSError as error:
            self.__exit__()
            raise unwritable(self.path, error) from error
        except UserError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock.is_locked:
            # Removed before it is released: afterwards it may be another process's lock.
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _read(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        # --out may name another file of the user's, which must be neither truncated nor appended to.
        if content[: len(_FIRST)] != _FIRST[: len(content)]:
            raise self._damaged(1)
        complete = content[: content.rfind(b"\n") + 1]
        for number, text in enumerate(complete.splitlines(), 1):
            try:
                line = json.loads(text)
                if number == 1:
                    self._refuse_other_job(line)
                else:
                    self.load_line(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise self._damaged(number) from None
        # A kill in the middle of a write leaves half a line; its work is repeated.
        if len(complete) < len(content):
            os.truncate(path, len(complete))
        if not complete:
            self._write(path, [{"kind": "job", **self.about, **self.job}])

    def _refuse_other_job(self, first: Json) -> None:
        names = [name for name in {**first, **self.job} if name != "kind" and name not in self.about]
        differences = [
            _difference(name, first.get(name), self.job.get(name)) for name in names if first.get(name) != self.job.get(name)
        ]
        if differences:
            raise UserError(
                "DSR437",
                f"{self.path}: holds another job ({'; '.join(differences)}): give the same settings again, name another --out, "
                "or delete this file",
            )

    def append(self, *lines: Json) -> None:
        """Write and load more lines.

        Raises:
            UserError: they cannot be written; the file keeps what it has.
        """
        if self.path is not None:
            self._write(self.path, lines)
        for line in lines:
            self.load_line(line)

    def _write(self, path: Path, lines: Iterable[Json]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json_lines(lines))
                file.flush()
                # The line must survive a crash of the machine, not only of the process.
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _damaged(self, number: int) -> UserError:
        return UserError(
            "DSR439",
            f"{self.path}, line {number}: damaged, or not written by `dsrecipes {self.command}`; name another --out, or "
            "delete this file to start over",
        )


def unwritable(path: Path | None, error: OSError) -> UserError:
    """Describe a job's file that cannot be written."""
    return UserError("DSR438", f"{path}: cannot be written ({error.strerror}); fix that, and the same command resumes")


def text_in(line: Json, name: str) -> str:
    """Get a text of a line (KeyError, TypeError: it has none)."""
    if not isinstance(line[name], str):
        raise TypeError(name)
    return line[name]


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe a difference; of hashes only that they differ."""
    is_hash = any(isinstance(value, str) and len(value) == 64 for value in (before, now))
    return f"the {name} changed" if is_hash else f"{name}: {before} there, {now} now"


def hash_of(value: Any) -> str:
    """SHA-256 of a value that is too long for the job's line."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def json_lines(rows: Iterable[Json]) -> str:
    """Rows as the text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
