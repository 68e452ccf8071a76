"""A checkpoint's manifest: what lies in it, byte for byte, and of which run it is. Written last, checked before use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dsrecipes.io.disk import checksum, sync, write_whole

MANIFEST = "manifest.json"
"""Sizes in bytes and sha256 of a checkpoint's files, and its own checksum. Without it a checkpoint is not whole."""

FileFacts = dict[str, tuple[int, str]]
"""File name, as posix path below the checkpoint -> size in bytes, sha256."""


def list_files(folder: Path) -> list[str]:
    """Names of a checkpoint's files but the manifest, the same on every rank."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(name for name in names if name != MANIFEST)


def hash_files(folder: Path, names: list[str]) -> FileFacts:
    """Sync the files, and read their sizes and hashes; each rank takes a part of them (OSError)."""
    facts: FileFacts = {}
    for name in names:
        sync(folder / name)
        facts[name] = ((folder / name).stat().st_size, checksum(folder / name))
    return facts


def write_manifest(folder: Path, facts: FileFacts, made_by: dict[str, Any], contract: dict[str, Any]) -> None:
    """Write the manifest, the last file of a checkpoint (OSError)."""
    for below in (path for path in folder.rglob("*") if path.is_dir()):
        sync(below)
    told = {"made_by": made_by, "contract": contract, "files": facts}
    write_whole(folder / MANIFEST, json.dumps({"checksum": _checksum(told), **told}, indent=1, ensure_ascii=False))


def _checksum(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """made_by, contract and files.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        told = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if told.pop("checksum") != _checksum(told):
            raise ValueError(f"{MANIFEST} is damaged: its checksum is another one")
        files = {name: (int(size), str(digest)) for name, (size, digest) in told["files"].items()}
        return {"made_by": dict(told["made_by"]), "contract": dict(told["contract"]), "files": files}
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing: a save was cut off") from error
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{MANIFEST} is damaged or of another version") from error


def find_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint as far as names and sizes tell; None where nothing is."""
    if not checkpoint.is_dir():
        return "does not exist"
    try:
        files = read_manifest(checkpoint)["files"]
        found = list_files(checkpoint)
        for name, (size, _) in files.items():
            if name not in found:
                return f"{name} is missing"
            if (checkpoint / name).stat().st_size != size:
                return f"{name} has {(checkpoint / name).stat().st_size:,} bytes instead of {size:,}"
    except (OSError, ValueError) as error:
        return str(error)
    extra = sorted(set(found) - set(files))
    return f"{extra[0]} is not in its manifest" if extra else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has all its files at their sizes, and none beside; `damage` looks into them."""
    return find_problem(checkpoint) is None
