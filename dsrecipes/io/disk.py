"""Files that are whole or not there, and what a disk has left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

SPARE_BYTES = 64 << 20
"""Left free beside what is written: logs go on growing."""


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's names (OSError); what another process wrote counts too."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def checksum(path: Path) -> str:
    """A file's sha256 (OSError)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, sync and rename, so that a torn one cannot exist (OSError)."""
    beside = path.with_name(f"{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.rename(path)
    sync(path.parent)


def put_in_place(new: Path, place: Path) -> None:
    """Give a finished folder its name; what has the name already goes only then (OSError)."""
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def no_room(folder: Path, need: int) -> str | None:
    """Why `need` bytes cannot be written below the folder now, in words; None where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"\0" * 4096)
        sync(probe)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or error}"
    finally:
        with contextlib.suppress(OSError):
            (folder / ".probe").unlink()
    if free < need + SPARE_BYTES:
        return f"{folder} has {free / 1e9:.2f} GB left, and {(need + SPARE_BYTES) / 1e9:.2f} GB are needed"
    return None


def is_disk_full(error: BaseException, path: Path) -> bool:
    """Whether a failed write says that the disk is full; torch's own writer does not, so there the disk is asked."""
    text = str(error).lower()
    if is_torch_writer(error):
        return shutil.disk_usage(existing_parent(path)).free < SPARE_BYTES
    return "no space left" in text or "quota exceeded" in text


def is_torch_writer(error: BaseException) -> bool:
    """Whether torch.save failed to write its file, which it tells in words of its own."""
    return any(
        words in str(error).lower()
        for words in ("pytorchstreamwriter", "inline_container", "iostream error", "unexpected pos")
    )


def is_write_error(error: BaseException) -> bool:
    """Whether a file could not be written: by Python, torch or safetensors."""
    return isinstance(error, OSError) or is_torch_writer(error) or "i/o error" in str(error).lower()
