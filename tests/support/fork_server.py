"""How do tests start processes without the ten seconds of imports? A server imports everything once and forks each.

Used by the rank pools (support/rank_pool.py) and by tests that run many command lines of one rank. What starts launchers needs a
real start.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.reaper import TAG

_MODULES = ("deepspeed", "peft", "dsrecipes.base", "dsrecipes.cli", "support.rank_pool", "support.rank_cases")
_LONGEST = 1 << 17
"""Bytes of an order: command line and environment; one packet of a Unix socket takes them."""


class Forked:
    """A process that a server forked, with the part of Popen's surface that tests use."""

    def __init__(self, control: socket.socket) -> None:
        """`control` gives the process id, then the exit code."""
        self._control = control
        self.pid = int(control.recv(64))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code (negative: a signal); subprocess.TimeoutExpired after `timeout` seconds without one."""
        if self.returncode is None:
            if not select.select([self._control], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._control.recv(64) or -signal.SIGKILL)  # nothing: the server itself was killed
            self._control.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has been waited for."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, and what it started without a session of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


class ForkServer:
    """A process that has imported everything, under variables that libraries read when they are imported."""

    def __init__(self, variables: dict[str, str]) -> None:
        """Start it; it imports while the caller goes on."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tests = str(Path(__file__).parents[1])
        outlives_tests = {TAG: os.environ.get(TAG, "").partition("/")[0] + "/"}
        path = {"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, str(theirs.fileno())],
                env=os.environ | outlives_tests | path | variables, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
            )  # fmt: skip

    def start(
        self, order: dict[str, Any], cwd: Path, env: Mapping[str, str], stdout: int, stderr: int, pipe: int | None = None
    ) -> Forked:
        """Fork a process in a session of its own.

        Args:
            order: {"argv": words of a `dsrecipes` command}, {"code": a program} or {"rank": true}, a worker of a pool.
            cwd: its working directory.
            env: its whole environment.
            stdout: a descriptor.
            stderr: a descriptor.
            pipe: the descriptor of a worker's connection.
        """
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.send(json.dumps(order | {"cwd": str(cwd), "env": dict(env)}).encode())
        try:
            with theirs:
                descriptors = [theirs.fileno(), stdout, stderr, *([] if pipe is None else [pipe])]
                socket.send_fds(self._orders, [b"fork"], descriptors)
            return Forked(control)
        except (OSError, ValueError) as error:
            self._log.seek(0)
            raise RuntimeError(f"the fork server ended:\n{self._log.read().decode()[-4000:]}") from error

    def stop(self) -> None:
        """End the server; what it forked goes on."""
        self._orders.close()
        self._process.wait()


_servers: dict[frozenset[tuple[str, str]], ForkServer] = {}


def fork_server(**variables: str) -> ForkServer:
    """The session's server for these variables, started when first asked for."""
    key = frozenset(variables.items())
    if key not in _servers:
        _servers[key] = ForkServer(variables)
    return _servers[key]


def stop_servers() -> None:
    """End all servers of the session."""
    for key in list(_servers):
        _servers.pop(key).stop()


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Warm:
    """Runs commands one after the other in a folder, each in a forked process."""

    def __init__(self, folder: Path, timeout: float | None = None, **variables: str) -> None:
        """`folder` is where commands run, for at most `timeout` seconds each; `variables` are added to the environment."""
        self.folder, self.timeout, self.variables = folder, timeout, variables

    def dsrecipes(self, *argv: str) -> Done:
        """The `dsrecipes` command."""
        return self._ask({"argv": [str(word) for word in argv]})

    def python(self, code: str) -> Done:
        """A Python program."""
        return self._ask({"code": code})

    def _ask(self, order: dict[str, Any]) -> Done:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = fork_server().start(order, self.folder, os.environ | self.variables, out.fileno(), err.fileno())
            try:
                code = process.wait(self.timeout)
            except BaseException:  # the test's time is up
                process.kill()
                raise
            said = [file.seek(0) or file.read().decode("utf-8", "replace") for file in (out, err)]
        return Done(code, *said)


def _serve(orders: socket.socket) -> None:
    """Fork for every order, and tell each exit code, until the session closes the socket."""
    for name in _MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # 700,000 objects, which every gc.collect() of a run would go through, 0.3 s a time
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    while True:
        ready = select.select([orders, wake], [], [])[0]
        if wake in ready:
            os.read(wake, 1024)
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with contextlib.suppress(OSError), children.pop(ended[0]) as control:  # the session may be gone
                    control.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
        if orders in ready:
            _, descriptors, _, _ = socket.recv_fds(orders, 16, 4)
            if not descriptors:
                return
            control = socket.socket(fileno=descriptors[0])
            order = json.loads(control.recv(_LONGEST))
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (orders, control, *children.values()):
                    each.close()
                _run(order, descriptors[1:])
            control.send(str(child).encode())
            children[child] = control
            for descriptor in descriptors[1:]:
                os.close(descriptor)


def _run(order: dict[str, Any], descriptors: list[int]) -> None:
    """What the forked process does; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        for descriptor, number in ((os.open(os.devnull, os.O_RDONLY), 0), (descriptors[0], 1), (descriptors[1], 2)):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
        if "argv" in order:
            sys.argv = ["dsrecipes", *order["argv"]]
            code = sys.modules["dsrecipes.cli"].main()
        elif "code" in order:
            exec(compile(order["code"], "<program>", "exec"), {"__name__": "__main__"})
            code = 0
        else:
            faulthandler.register(signal.SIGUSR1)
            sys.modules["support.rank_pool"].work(Connection(descriptors[2]))
            code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
