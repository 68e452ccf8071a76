"""What does a person see? Rank 0's header, bars and footer; the libraries' output is written to the run folder's log."""

from __future__ import annotations

import contextlib
import io
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm


class _LogStream(io.TextIOWrapper):
    """A stream into the log that ignores write errors: a library's warning on a full disk must not end a run."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class _PersistentStream:
    """A stream that survives its reader: after `| head` has ended or the terminal is closed, it writes to the log.

    Otherwise the next line of output would end hours of training with BrokenPipeError.
    """

    def __init__(self, stream: IO[str], log_fd: int | None) -> None:
        """Wrap a stream; once its reader is gone, output is written to `log_fd`, or nowhere for None."""
        self._stream, self._log_fd = stream, log_fd
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError:
            self.lost = True
            self.follow_log()
            with contextlib.suppress(OSError):  # the log's disk may be full too, which must not end the run
                self._stream.flush()  # what the stream has buffered

    def follow_log(self) -> None:
        """Write to the log if the reader is gone; called again when the log moves."""
        if self.lost:
            _replace(self._stream.fileno(), self._log_fd)


def _replace(fd: int, log_fd: int | None) -> None:
    """Redirect a descriptor to another one, or to /dev/null."""
    if log_fd is not None:
        os.dup2(log_fd, fd)
        return
    # replaced and not closed: a closed descriptor 1 would be given to the next file that is opened
    null_fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_fd, fd)
    os.close(null_fd)


def leave_unread(*fds: int) -> None:
    """Redirect descriptors whose reader is gone to /dev/null; otherwise Python exits with code 120."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, 0)
    for fd, event in poll.poll(0):
        if event & (select.POLLERR | select.POLLHUP):
            _replace(fd, None)


class Console:
    """Prints on rank 0 only; with `capture` everything else that the process prints is written to a log file.

    Descriptors 1 and 2 are redirected, not only sys.stdout, because compiled libraries write to them directly. Until the
    run folder is known the output is kept in a temporary file, which `log_to` moves. With `rank_logs`, a rank's number,
    nothing is hidden, and from `log_to` on everything is also written to logs/rank_N.log.
    """

    def __init__(
        self, *, main: bool = True, capture: bool = False, rank_logs: int | None = None, out: IO[str] | None = None
    ) -> None:
        self.main, self.captured, self.rank_logs = main, capture, rank_logs
        stream = out or sys.stdout
        self._streams: tuple[Any, Any] | None = None
        self.bars = True
        self._open: tqdm | None = None
        self._saved: list[int] = []
        if capture:
            sys.stdout.flush()
            sys.stderr.flush()
            # copies, so that the person's terminal can still be written to, and restored by `release`
            self._saved = [os.dup(1), os.dup(2)]
            stream = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
            self._spool = tempfile.TemporaryFile()
            self._redirect(self._spool.fileno())
        if capture or rank_logs is not None:
            self._streams = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = (_LogStream(open(fd, "wb", 0, closefd=False), write_through=True) for fd in (1, 2))
        self.out = _PersistentStream(stream, 1 if capture else None)

    def _redirect(self, fd: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)

    @property
    def error_fd(self) -> int:
        """The descriptor from which a person reads errors, captured or not."""
        return self._saved[1] if self.captured else 2

    def log_to(self, path: Path) -> None:
        """Append what was captured so far, and everything that follows, to `path`."""
        if self.rank_logs is not None:
            self._tee(path.parent / "logs" / f"rank_{self.rank_logs}.log")
        if not self.captured:
            return
        with path.open("ab") as log:
            self._redirect(log.fileno())
            self.out.follow_log()
            self._spool.seek(0)
            shutil.copyfileobj(self._spool, log)

    def _tee(self, path: Path) -> None:
        """Copy stdout and stderr to `path` through a separate process, which still writes when this one crashes."""
        path.parent.mkdir(exist_ok=True)
        # tee inherits that SIGPIPE is ignored; otherwise it, and with it the log, would end with the reader of stdout
        tee = subprocess.Popen(
            ["tee", "-a", str(path)], stdin=subprocess.PIPE, start_new_session=True, restore_signals=False
        )
        assert tee.stdin is not None
        self._redirect(tee.stdin.fileno())
        tee.stdin.close()

    def release(self) -> None:
        """Close an open progress bar and restore the process's own stdout and stderr."""
        if self._open is not None:
            self._open.close()
        if self._streams:
            sys.stdout, sys.stderr = self._streams
        if self.captured:
            for fd, saved in zip((1, 2), self._saved, strict=True):
                os.dup2(saved, fd)
                os.close(saved)
            self.captured = False
        # at the very end, because Python flushes stdout once more at exit
        leave_unread(1, 2)

    def say(self, text: str = "") -> None:
        """Print a line on rank 0."""
        if self.main:
            # tqdm.write puts the line above an open bar; a pipe would hold it back until a block is full
            tqdm.write(text, file=self.out)
            self.out.flush()

    def progress(self, label: str, *, total: int | None = None, initial: int = 0, unit: str = "it", **options: Any) -> tqdm:
        """Open a progress bar on rank 0; in a file or pipe it is updated every ten seconds, not ten times a second."""
        live = self.out.isatty()
        self._open = tqdm(
            desc=label,
            total=total,
            initial=initial,
            unit=unit,
            file=self.out,
            disable=not (self.main and self.bars),
            mininterval=0.1 if live else 10,
            dynamic_ncols=live,
            ncols=None if live else 100,
            **options,
        )
        return self._open
