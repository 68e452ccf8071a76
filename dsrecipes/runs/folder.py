"""The run folder: where each thing lies, and which checkpoints are whole."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsrecipes.errors import UserError
from dsrecipes.find import user_path

MANIFEST = "manifest.json"
"""Written last into a checkpoint: its files and their sizes in bytes. Without it a checkpoint is not whole."""
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path

    config = property(lambda self: self.path / "config.yaml")
    ds_config = property(lambda self: self.path / "ds_config.json")
    environment = property(lambda self: self.path / "environment.json")
    log = property(lambda self: self.path / "log.jsonl")
    console = property(lambda self: self.path / "log.txt")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints = property(lambda self: self.path / "checkpoints")
    model = property(lambda self: self.path / "model")
    metrics = property(lambda self: self.path / "metrics.json")
    curve = property(lambda self: self.path / "loss_curve.png")
    expected = property(lambda self: self.path / "expected.safetensors")
    verified = property(lambda self: self.path / "VERIFIED.json")
    data = property(lambda self: self.path / "data.json")
    page = property(lambda self: self.path / "report.html")

    def whole_checkpoints(self) -> list[Path]:
        """Checkpoints whose files are all there at their recorded sizes, oldest first."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if p.name[11:].isdecimal() and is_whole(p)]
        return sorted(found, key=lambda p: int(p.name[11:]))


def default_path(recipe: str) -> Path:
    """runs/RECIPE/TIMESTAMP, one that does not exist yet."""
    base = Path("runs") / recipe / time.strftime("%Y%m%d-%H%M%S")
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def check_output(path: Path, *, resuming: bool, overwrite: bool) -> None:
    """Refuse a folder that a run would overwrite or could not write into; delete one where told to.

    Raises:
        UserError: the folder holds something, is a file, cannot be written, or its disk is full.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path}: there is a file of this name; choose another folder")
    if path.is_dir() and any(path.iterdir()) and not resuming:
        if not overwrite:
            raise UserError(
                f"--output_dir {path}: the folder exists and is not empty. Go on with it: --resume_from_checkpoint auto; "
                "start anew: another --output_dir, or --overwrite_output_dir to delete it"
            )
        if not RunFolder(path).config.is_file():
            raise UserError(f"--overwrite_output_dir: {path} is no run folder (no config.yaml in it); delete it yourself")
        shutil.rmtree(path)
    ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not ancestor.is_dir():
        raise UserError(f"--output_dir {path}: {ancestor} is a file; choose another folder")
    if not os.access(ancestor, os.W_OK):
        raise UserError(f"--output_dir {path}: no permission to write into {ancestor}")
    free = shutil.disk_usage(ancestor).free
    if free < _SPARE_BYTES:
        raise UserError(f"--output_dir {path}: no space left on the disk ({free / 1e6:.0f} MB free); choose another disk")


def is_disk_full(error: BaseException, path: Path) -> bool:
    """Whether a failed write says that the disk is full; torch's own writer does not, so there the disk is asked."""
    text = str(error).lower()
    if any(words in text for words in ("pytorchstreamwriter", "inline_container", "iostream error")):
        return shutil.disk_usage(path).free < _SPARE_BYTES
    return "no space left" in text or "quota exceeded" in text


def write_whole(path: Path, text: str) -> None:
    """Write beside the file and rename, so that a torn one cannot exist (OSError)."""
    beside = path.with_name(f"{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)


def write_manifest(checkpoint: Path, made_by: dict[str, Any]) -> None:
    """Record a checkpoint's files and sizes."""
    files = {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
    write_whole(checkpoint / MANIFEST, json.dumps({"made_by": made_by, "files": files}, indent=1))


def is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint has a manifest and every file in it, at its size."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_checkpoint(asked: str, folder: RunFolder | None) -> Path | None:
    """`auto`, `step100` or a path as a whole checkpoint; None where `auto` finds none.

    Raises:
        UserError: no such checkpoint, or one that is not whole.
    """
    if asked.lower() in ("auto", "true"):
        whole = folder.whole_checkpoints() if folder else []
        return whole[-1] if whole else None
    if asked.startswith("step") and asked[4:].isdecimal():
        if folder is None:
            raise UserError(
                f"--resume_from_checkpoint {asked}: name the run with --output_dir, or give the checkpoint's path"
            )
        path = folder.checkpoints / f"checkpoint-{asked[4:]}"
        known = ", ".join(f"step{p.name[11:]}" for p in folder.whole_checkpoints()) or "none"
    else:
        path, known = user_path(asked), ""
        if (path / "checkpoints").is_dir():
            whole = RunFolder(path).whole_checkpoints()
            path = whole[-1] if whole else path / "checkpoints"
    if not is_whole(path):
        state = "is not whole (a save was cut off)" if path.is_dir() else "does not exist"
        hint = f"; whole ones of this run: {known}" if known else "; `auto` takes the newest whole one of --output_dir"
        raise UserError(f"--resume_from_checkpoint {asked}: {path} {state}{hint}")
    return path
