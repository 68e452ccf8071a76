"""A checkpoint's manifest: what lies in it, byte for byte, and of which run it is. Written last, checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsrecipes.errors import UserError
from dsrecipes.io.disk import checksum, sync, write_whole

MANIFEST = "manifest.json"
"""Sizes in bytes and sha256 of a checkpoint's files, and its own checksum. Without it a checkpoint is not whole."""
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")
_KNOWN_GLOBALS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.dtypes.UInt32DType",
        "numpy.ndarray",
    }
)
"""What DeepSpeed's and Trainer's own files name beside what torch.load(weights_only=True) allows: data, no code."""

Facts = dict[str, tuple[int, str]]
"""File name, as posix path below the checkpoint -> size in bytes, sha256."""


def files_of(folder: Path) -> list[str]:
    """Names of a checkpoint's files but the manifest, the same on every rank."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(name for name in names if name != MANIFEST)


def facts_of(folder: Path, names: list[str]) -> Facts:
    """Sync the files, and read their sizes and hashes; each rank takes a part of them (OSError)."""
    facts: Facts = {}
    for name in names:
        sync(folder / name)
        facts[name] = ((folder / name).stat().st_size, checksum(folder / name))
    return facts


def seal(folder: Path, facts: Facts, made_by: dict[str, Any], contract: dict[str, Any]) -> None:
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


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint as far as names and sizes tell; None where nothing is."""
    if not checkpoint.is_dir():
        return "does not exist"
    try:
        files = read_manifest(checkpoint)["files"]
        found = files_of(checkpoint)
        for name, (size, _) in files.items():
            if name not in found:
                return f"{name} is missing"
            if (checkpoint / name).stat().st_size != size:
                return f"{name} has {(checkpoint / name).stat().st_size:,} bytes instead of {size:,}"
    except (OSError, ValueError) as error:
        return str(error)
    extra = sorted(set(found) - set(files))
    return f"{extra[0]} is not in its manifest" if extra else None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has all its files at their sizes, and none beside; `damage` looks into them."""
    return fault(checkpoint) is None


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first of the files, of every `parts`-th from `part` on, that is not what was saved, or that no one should load.

    A pickle is read for the names in it, never run: one that names anything but the classes of Trainer's and DeepSpeed's
    own files would call it when it is loaded, whatever the manifest says.
    """
    import torch

    files = read_manifest(checkpoint)["files"]
    for name in sorted(files)[part::parts]:
        path = checkpoint / name
        try:
            if checksum(path) != files[name][1]:
                return f"{name} is damaged: its sha256 is not the manifest's"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if path.suffix in PICKLES:
            try:
                names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _KNOWN_GLOBALS
            except Exception as error:  # whatever a damaged or hostile pickle makes the reader raise
                return f"{name} is no file of torch.save ({type(error).__name__})"
            if names:
                return f"{name} would run {sorted(names)[0]} when it is loaded"
    return None


def choose(candidates: list[Path], check: Callable[[Path], str | None], told: Callable[[str], None]) -> Path:
    """The first candidate that `check` finds nothing wrong with; the others are named and left alone.

    Raises:
        UserError: each has something wrong.
    """
    wrong = ""
    for path in candidates:
        problem = check(path)
        if problem is None:
            return path
        wrong = f"{path}: {problem}"
        told(f"{'damaged':<10}{wrong}; left alone")
    raise UserError(
        f"--resume_from_checkpoint: {wrong}. No other checkpoint was asked for or is whole; "
        "give another one, or start anew in another --output_dir"
    )
