"""How is a file written so that a crash never leaves half of it, and is there enough disk?"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

SPARE_BYTES = 64 << 20
"""Kept free in addition to what is written, because logs keep growing."""


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, including what another process wrote (OSError)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def checksum(path: Path) -> str:
    """Return a file's sha256 (OSError)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Atomically write a text file: write to a temporary name, sync, rename (OSError)."""
    # in the same folder, because a rename is atomic only inside one file system
    temporary = path.with_name(f"{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.rename(path)
    # without this, a power failure can undo the rename although the content is on the disk
    sync(path.parent)


def put_in_place(staged: Path, target: Path) -> None:
    """Replace the folder `target` with the complete folder `staged`; the old one is deleted only afterwards (OSError)."""
    # a folder cannot be renamed onto another one that has content, so the old one is moved away first: a crash between the
    # two renames leaves it as NAME.old
    old = target.with_name(f"{target.name}.old")
    # left over from a crash during the last deletion
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staged.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def existing_parent(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())


def no_room(folder: Path, need: int) -> str | None:
    """Return why `need` bytes cannot be written below the folder now; None where they can.

    A file is written and synced, because quotas and network file systems report free space that they do not grant.
    """
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
    """Return whether a write failed because the disk is full; torch's writer does not say, so then the free space decides."""
    text = str(error).lower()
    if is_torch_writer(error):
        return shutil.disk_usage(existing_parent(path)).free < SPARE_BYTES
    return "no space left" in text or "quota exceeded" in text


def is_torch_writer(error: BaseException) -> bool:
    """Return whether torch.save failed to write its file, which shows only in the text of the error."""
    parts = ("pytorchstreamwriter", "inline_container", "iostream error", "unexpected pos")
    return any(part in str(error).lower() for part in parts)


def is_write_error(error: BaseException) -> bool:
    """Return whether a file could not be written: by Python, torch or safetensors."""
    return isinstance(error, OSError) or is_torch_writer(error) or "i/o error" in str(error).lower()
