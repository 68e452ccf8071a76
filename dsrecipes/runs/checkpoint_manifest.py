"""What a checkpoint holds: its manifest names every file with size and sha256, is written last and checked before use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dsrecipes.io.disk import checksum, sync, write_whole

MANIFEST = "manifest.json"
"""Sizes in bytes and sha256 of a checkpoint's files, and its own checksum. Without it a checkpoint is incomplete."""

FileFacts = dict[str, tuple[int, str]]
"""File name, as posix path below the checkpoint -> size in bytes, sha256."""


def list_files(folder: Path) -> list[str]:
    """Names of a checkpoint's files except the manifest, in the same order on every rank."""
    # A link to a folder counts as a file, so that it is noticed as one that does not belong here.
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    names = {path.relative_to(folder).as_posix() for path in files}
    return sorted(names - {MANIFEST})


def hash_files(folder: Path, names: list[str]) -> FileFacts:
    """Write files through to the disk, and read their sizes and hashes; ranks share the work (OSError)."""
    facts: FileFacts = {}
    for name in names:
        # before the manifest exists, which must not reach the disk earlier than what it vouches for
        sync(folder / name)
        facts[name] = ((folder / name).stat().st_size, checksum(folder / name))
    return facts


def write_manifest(folder: Path, facts: FileFacts, made_by: dict[str, Any], contract: dict[str, Any]) -> None:
    """Write the manifest, the last file of a checkpoint (OSError).

    Args:
        facts: of all files.
        made_by: ranks, ZeRO stage and layout of the run.
        contract: what a run that resumes must have in common with it.
    """
    # Names of files are part of their folder: without this, a power failure could lose them after the manifest is written.
    for below in (path for path in folder.rglob("*") if path.is_dir()):
        sync(below)
    content = {"made_by": made_by, "contract": contract, "files": facts}
    # the manifest guards all other files, and its checksum guards the manifest
    text = json.dumps({"checksum": _checksum(content), **content}, indent=1, ensure_ascii=False)
    write_whole(folder / MANIFEST, text)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read made_by, contract and files.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if content.pop("checksum") != _checksum(content):
            raise ValueError(f"{MANIFEST} is damaged: its checksum does not match")
        files = {name: (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        return {"made_by": dict(content["made_by"]), "contract": dict(content["contract"]), "files": files}
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing: a save was cut off") from error
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{MANIFEST} is damaged or of another version") from error


def find_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, judged by names and sizes; None where nothing is."""
    if not checkpoint.is_dir():
        return "does not exist"
    try:
        expected = read_manifest(checkpoint)["files"]
        present = list_files(checkpoint)
        for name, (size, _) in expected.items():
            if name not in present:
                return f"{name} is missing"
            actual = (checkpoint / name).stat().st_size
            if actual != size:
                return f"{name} has {actual:,} bytes instead of {size:,}"
    except (OSError, ValueError) as error:
        return str(error)
    # a file too many is a fault as well: DeepSpeed and Trainer load what they find by name
    extra = sorted(set(present) - set(expected))
    return f"{extra[0]} is not in its manifest" if extra else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has all its files at their sizes, and no other; checkpoint_integrity checks their content."""
    return find_problem(checkpoint) is None
