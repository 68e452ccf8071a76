"""The run folder: where each thing lies, and which checkpoints are whole."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsrecipes.errors import UserError
from dsrecipes.io.disk import SPARE_BYTES, existing_parent
from dsrecipes.io.paths import flag_path, user_path
from dsrecipes.runs.checkpoint_manifest import MANIFEST, find_problem, is_complete


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
    reference = property(lambda self: self.path / "expected.safetensors")
    verified = property(lambda self: self.path / "VERIFIED.json")
    data = property(lambda self: self.path / "data.json")
    page = property(lambda self: self.path / "report.html")
    lock = property(lambda self: self.path / ".lock")

    def all_checkpoints(self) -> list[Path]:
        """Checkpoints, whole or not, oldest first."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if p.name[11:].isdecimal()]
        return sorted(found, key=lambda p: int(p.name[11:]))

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints whose files are all there at their recorded sizes, oldest first."""
        return [path for path in self.all_checkpoints() if is_complete(path)]


def default_path(recipe: str) -> Path:
    """runs/RECIPE/TIMESTAMP, one that does not exist yet."""
    base = Path("runs") / recipe / time.strftime("%Y%m%d-%H%M%S")
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def check_output(path: Path, *, resuming: bool, overwrite: bool) -> None:
    """Refuse a folder that a run would overwrite or could not write into.

    Raises:
        UserError: the folder holds something, is a file, cannot be written, or its disk is full.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path}: there is a file of this name; choose another folder")
    if path.is_dir() and any(each.name != ".lock" for each in path.iterdir()) and not resuming:
        if not overwrite:
            raise UserError(
                f"--output_dir {path}: the folder exists and is not empty. Go on with it: --resume_from_checkpoint auto; "
                "start anew: another --output_dir, or --overwrite_output_dir to delete it"
            )
        if not RunFolder(path).config.is_file():
            raise UserError(f"--overwrite_output_dir: {path} is no run folder (no config.yaml in it); delete it yourself")
    ancestor = existing_parent(path)
    if not ancestor.is_dir():
        raise UserError(f"--output_dir {path}: {ancestor} is a file; choose another folder")
    if not os.access(ancestor, os.W_OK):
        raise UserError(f"--output_dir {path}: no permission to write into {ancestor}")
    total, _, free = shutil.disk_usage(ancestor)
    if not total:  # such as /proc
        raise UserError(f"--output_dir {path}: the file system of {ancestor} stores no files; choose another folder")
    if free < SPARE_BYTES:
        raise UserError(f"--output_dir {path}: no space left on the disk ({free / 1e6:.0f} MB free); choose another disk")


def find_checkpoints(asked: str, folder: RunFolder | None, told: Callable[[str], None]) -> list[Path]:
    """Where `auto`, `step100`, a run folder or a checkpoint's path may go on from, best first; none for an `auto` at its start.

    Names and sizes are looked at; checkpoint_integrity.find_damage looks into the files.

    Raises:
        UserError: no such checkpoint, or none that is whole.
    """
    if asked.lower() in ("auto", "true"):
        return _newest_first(folder, told) if folder else []
    if asked.startswith("step") and asked[4:].isdecimal():
        if folder is None:
            raise UserError(
                f"--resume_from_checkpoint {asked}: name the run with --output_dir, or give the checkpoint's path"
            )
        path = folder.checkpoints / f"checkpoint-{asked[4:]}"
    else:
        path = flag_path("resume_from_checkpoint", asked)
        if path.name == "checkpoints":
            path = path.parent
        if path.name == "model" and (path.parent / "config.yaml").is_file():
            raise UserError(
                f"--resume_from_checkpoint {asked}: this is a run's trained model; its run folder is {path.parent}"
            )
        if (path / "checkpoints").is_dir():
            found = _newest_first(RunFolder(path), told)
            if found:
                return found
            path = path / "checkpoints"
    problem = find_problem(path)
    if problem:
        whole = folder.complete_checkpoints() if folder else []
        known = ", ".join(f"step{each.name[11:]}" for each in whole) or "none"
        hint = f"whole ones of this run: {known}" if folder else "`auto` takes the newest whole one of --output_dir"
        if path.is_dir() and not (path / MANIFEST).exists() and not path.name.startswith("checkpoint"):
            problem = "neither a checkpoint nor a run folder (it has no manifest.json and no checkpoints/)"
        where = "" if str(path) == asked else f"{path}: "
        raise UserError(f"--resume_from_checkpoint {asked}: {where}{problem}; {hint}")
    return [path]


def _newest_first(folder: RunFolder, told: Callable[[str], None]) -> list[Path]:
    """The whole checkpoints; the others are named, for who expects a later step should know."""
    found = sorted(folder.all_checkpoints(), key=lambda p: -int(p.name[11:]))
    faults = {path: find_problem(path) for path in found}
    whole = [path for path, problem in faults.items() if problem is None]
    for path, problem in faults.items():
        if problem and (not whole or int(path.name[11:]) > int(whole[0].name[11:])):
            told(f"{'damaged':<10}{path}: {problem}; left alone")
    if found and not whole:
        raise UserError(
            f"--resume_from_checkpoint: no checkpoint of {folder.path} is whole ({found[0].name}: {faults[found[0]]}). "
            "Start anew in another --output_dir"
        )
    return whole


def find_run(name: str, *, ended: bool = True) -> RunFolder:
    """A run folder by its path, or `last`: the newest under runs/ that ended with a model.

    Args:
        ended: refuse a run without model/; False for what an unfinished one is enough for.

    Raises:
        UserError: there is none, or it holds no trained model.
    """
    if name == "last":
        found = [each for path in Path("runs").glob("*/*/model") if (each := RunFolder(path.parent)).config.is_file()]
        if not found:
            raise UserError("last: no finished run under runs/; train one, or give the path of a run folder")
        return max(found, key=lambda each: each.model.stat().st_mtime)
    folder = RunFolder(user_path(name))
    if not folder.path.is_dir():
        raise UserError(f"{name}: no such run folder; give the path of one, or `last`")
    if not folder.config.is_file():
        run = next((path for path in list(folder.path.absolute().parents)[:2] if (path / "config.yaml").is_file()), None)
        if run is not None:
            raise UserError(f"{name}: this lies inside a run folder; give the run folder itself, {run}")
        raise UserError(f"{name}: no run folder (no config.yaml in it); give the path of one, or `last`")
    if ended and not folder.model.is_dir():
        raise UserError(
            f"{name}: this run has no model yet; `dsrecipes train --config {folder.config} --output_dir {name} "
            "--resume_from_checkpoint auto` goes on with it"
        )
    return folder
