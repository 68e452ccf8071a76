"""The file of a judge's work: one JSON object a line, flushed as it comes, so that a restart goes on from it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsrecipes.errors import UserError

Json = dict[str, Any]


class JudgeFile:
    """The answers and judgements so far, and where more are appended."""

    def __init__(self, path: Path, job: Json) -> None:
        """Open or begin the file; `job` is what must be the same for a restart to go on.

        Raises:
            UserError: the file is something else, is of another job, is damaged, or cannot be written.
        """
        self.path = path
        self.answers: dict[tuple[int, str], str] = {}
        self.judgements: dict[tuple[int, str], Json] = {}
        self.checks: list[Json] = []
        lines = self._read()
        if lines:
            self._refuse_other(lines[0], job)
            for line in lines[1:]:
                self._take(line)
        else:
            self.write({"kind": "job", **job})

    def _read(self) -> list[Json]:
        """All lines; a last one that a kill tore is cut off, since what follows must begin a line of its own."""
        try:
            raw = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be read ({error.strerror})") from error
        whole = raw[: raw.rfind(b"\n") + 1]
        lines: list[Json] = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(json.loads(line))
                known = isinstance(lines[-1], dict) and "kind" in lines[-1]
            except ValueError:
                known = False
            if not known or lines[0]["kind"] != "job":
                raise UserError(f"--out {self.path}, line {number}: not written by `dsrecipes judge`; name another file")
        if raw and not lines:
            raise UserError(f"--out {self.path}: not written by `dsrecipes judge`; name another file")
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))
        return lines

    def _refuse_other(self, found: Json, job: Json) -> None:
        for name, value in json.loads(json.dumps(job)).items():
            if found.get(name) != value and name not in ("run", "judge_folder"):
                raise UserError(
                    f"--out {self.path}: holds another job: its {name} is {_short(found.get(name))}, now it is "
                    f"{_short(value)}. Name another --out, or go on as it began"
                )

    def _take(self, line: Json) -> None:
        if line["kind"] == "answer":
            self.answers[line["item"], line["of"]] = line["text"]
        elif line["kind"] == "judgement":
            self.judgements[line["item"], line["order"]] = line
        elif line["kind"] == "check":
            self.checks.append(line)

    def write(self, line: Json) -> None:
        """Append a line, and see that it left this process."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from error
        self._take(line)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep a second process off the same file.

    Raises:
        UserError: there is one, or the folder cannot be written.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"--out {path}: another `dsrecipes judge` is writing it; wait for it, or name another") from error
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else json.dumps(value, ensure_ascii=False)
