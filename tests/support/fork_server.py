"""Commands in processes of their own without the ten seconds of imports: a warm process forks one for each.

Used by tests that run many command lines of one rank. What starts launchers or several ranks needs a real start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Warm:
    """A process that has imported everything; every call forks it."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where commands run."""
        self.folder = folder
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=self.folder, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def dsrecipes(self, *argv: str) -> Done:
        """The `dsrecipes` command."""
        return self._ask({"argv": [str(word) for word in argv]})

    def python(self, code: str) -> Done:
        """A Python program."""
        return self._ask({"code": code})

    def _ask(self, order: dict) -> Done:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        try:
            code = int(self.process.stdout.readline())
        except BaseException:  # the test's time is up: end the command, and take no late answer for the next one's
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._start()
            raise
        out, err = ((self.folder / name).read_text(encoding="utf-8", errors="replace") for name in (".out", ".err"))
        return Done(code, out, err)

    def stop(self) -> None:
        """End the warm process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print is no answer
    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    import dsrecipes.base  # noqa: F401
    from dsrecipes import cli

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # not the orders to come
            sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
            for fd, name in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            code = 1
            try:
                if "argv" in order:
                    sys.argv = ["dsrecipes", *order["argv"]]
                    code = cli.main()
                else:
                    exec(compile(order["code"], "<program>", "exec"), {"__name__": "__main__"})
                    code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")


if __name__ == "__main__":
    _serve()
