"""What fuzz tests share: hostile values and bytes, real files made wrong, and what must hold when they are read."""

from __future__ import annotations

import gzip
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dsrecipes import UserError

LIMIT = 20
"""Seconds that one case may take."""
SECRETS = {
    "HF_TOKEN": "hf_canaryOfTheFuzzTests", "DSRECIPES_JUDGE_KEY": "sk-canary-judge", "OPENAI_API_KEY": "sk-canary-openai",
    "WANDB_API_KEY": "canary-wandb",
}  # fmt: skip
"""In the environment of every case; none may be printed or written."""
EVIL = Path(tempfile.gettempdir()) / f"dsrecipes-canary-{os.getpid()}"
"""Exists once code of a hostile file was run."""


def fuzz(cases: int) -> settings:
    """The same cases on every machine, none kept between runs; FUZZ_TIMES multiplies them (`make test-all`)."""
    cases *= int(os.environ.get("FUZZ_TIMES", "1"))
    return settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


class Hang(BaseException):
    """A case took longer than LIMIT; not an Exception, so that nobody takes it for a bad file."""


class Bomb:
    """A pickle of this touches EVIL when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {EVIL}",)


@contextmanager
def guarded() -> Iterator[None]:
    """Raises Hang after LIMIT seconds."""

    def stop(number: int, frame: object) -> None:
        raise Hang(f"longer than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    left = signal.setitimer(signal.ITIMER_REAL, LIMIT)  # the time limit of the test, which has this timer too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before)


def holds(read: Callable[[], Any]) -> str | None:
    """Run one case: it succeeds, or ends with a UserError, whose message is given back."""
    message = None
    with guarded():
        try:
            read()
        except UserError as error:
            message = str(error)
    assert not EVIL.exists(), "code of a hostile file was run"
    if message is not None:
        assert message.strip() and len(message) < 4000, f"no clear message: {message[:200]!r} ({len(message)} characters)"
        assert not any(secret in message for secret in SECRETS.values())
    return message


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> (size, time of the last change in nanoseconds) of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


# ---- hostile values ----

TEXTS = (
    "", " ", "auto", "true", "null", "none", "NaN", "1e999", "-1", "0", "\0", "a\0b", "\ud800", "\u202e\u2028\x85", "\x1b[31m",
    "../../../../etc/passwd", "/etc/passwd", "~nobody-of-this-name/x", "/" + "a" * 300, "x" * 9000, "9" * 5000, "{}", "[]",
    "a\nb", "--x", "%s%n{0}{x!r}", "{{ 9 }}", "臺灣", "os", "2026-13-45",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 10**9, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"))
values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(TEXTS) | st.sampled_from(NUMBERS) | st.text(max_size=8) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
"""What stands where something else belongs."""


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path to each value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def put(value: Any, place: tuple, new: Any) -> Any:
    """A copy of a JSON value with another at one place; `...` takes it away."""
    if not place:
        return None if new is ... else new
    key, rest = place[0], place[1:]
    copy = dict(value) if isinstance(value, dict) else list(value)
    if not rest and new is ...:
        del copy[key]
    else:
        copy[key] = put(value[key], rest, new)
    return copy


@st.composite
def changed(draw: st.DrawFn, value: Any, extra: tuple[str, ...] = ()) -> Any:
    """A JSON value with one to three places changed, taken away, or added under `extra` names."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(value)[:400]))
        if isinstance(value, dict) and draw(st.booleans()):
            place = (draw(st.sampled_from([*map(str, value), *extra] or ["x"])),)
            value = {**value, place[0]: value.get(place[0])}
        value = put(value, place, draw(st.just(...) | values))
    return value


# ---- hostile bytes ----


@st.composite
def spoiled(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes that were cut off, flipped, put in or written in another encoding."""
    how = draw(st.sampled_from(("cut", "flip", "flip", "put", "put", "double", "encoding", "whole")))
    at = draw(st.integers(0, max(len(raw) - 1, 0)))
    if how == "cut":
        return raw[:at]
    if how == "flip":
        return raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :] if raw else b"\xff"
    if how == "put":
        return (
            raw[:at]
            + draw(st.sampled_from((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\x1b", b'"', b"\\ud800")))
            + raw[at:]
        )
    if how == "double":
        return raw[:at] + raw
    if how == "encoding":
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return raw[::-1]
        return draw(st.sampled_from((
            text.encode("utf-16"), text.encode("utf-8-sig"), text.encode("cp950", "replace"), text.replace("\n", "\r\n").encode(),
            text.replace("\n", "\r").encode(), text.encode("utf-32"),
        )))  # fmt: skip
    return draw(
        st.sampled_from(
            (b"", b"\0" * 4096, b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xd8\xff", b"null", b"PK\x03\x04", b"9" * 5000)
        )
    )


def text_of(value: Any) -> bytes:
    """JSON with what Python writes beyond the standard: NaN, Infinity, lone surrogates as escapes."""
    return json.dumps(value).encode()


@st.composite
def json_file(draw: st.DrawFn, value: Any, extra: tuple[str, ...] = ()) -> bytes:
    """A JSON file with wrong values, or with wrong bytes."""
    if draw(st.integers(0, 3)):
        return text_of(draw(changed(value, extra)))
    return draw(spoiled(text_of(value)))


def write(path: Path, raw: bytes) -> Path:
    """The bytes as a file, gzipped where its name says so."""
    path.write_bytes(gzip.compress(raw, 1) if path.name.endswith(".gz") else raw)
    return path
