"""Where the files of a run are, which folders a run may use, and which checkpoint it resumes from."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsrecipes.errors import UserError, coded
from dsrecipes.io.disk import SPARE_BYTES, existing_parent
from dsrecipes.io.paths import flag_path, user_path
from dsrecipes.runs.checkpoint_manifest import MANIFEST, find_problem, is_complete

_PREFIX = "checkpoint-"
_RESUME = "--resume_from_checkpoint"


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
        """Checkpoints, complete or not, oldest first."""
        named = [path for path in self.checkpoints.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal()]
        return sorted(named, key=_step)

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints that have all their files at the recorded sizes, oldest first."""
        return [path for path in self.all_checkpoints() if is_complete(path)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[len(_PREFIX) :])


def default_path(recipe: str) -> Path:
    """runs/RECIPE/TIMESTAMP, with a number where that exists."""
    base = Path("runs") / recipe / time.strftime("%Y%m%d-%H%M%S")
    # two runs may start within the same second
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def check_output(path: Path, *, resuming: bool, overwrite: bool) -> None:
    """Refuse a folder that a run would overwrite or could not write into.

    Raises:
        UserError: the folder is not empty, is a file, cannot be written, or its disk is full.
    """
    flag = f"--output_dir {path}"
    if path.exists() and not path.is_dir():
        raise UserError("DSR337", f"{flag}: there is a file of this name; choose another folder")
    # The lock is there as soon as another process has opened the folder.
    if path.is_dir() and not resuming and any(entry.name != ".lock" for entry in path.iterdir()):
        _check_not_empty(path, overwrite)
    ancestor = existing_parent(path)
    if not ancestor.is_dir():
        raise UserError("DSR337", f"{flag}: {ancestor} is a file; choose another folder")
    if not os.access(ancestor, os.W_OK):
        raise UserError("DSR337", f"{flag}: no permission to write into {ancestor}")
    total, _, free = shutil.disk_usage(ancestor)
    # a file system without blocks, such as /proc
    if not total:
        raise UserError("DSR337", f"{flag}: the file system of {ancestor} stores no files; choose another folder")
    if free < SPARE_BYTES:
        raise UserError("DSR338", f"{flag}: no space left on the disk ({free / 1e6:.0f} MB free); choose another disk")


def _check_not_empty(path: Path, overwrite: bool) -> None:
    """Allow only a run folder to be overwritten, and only on request (UserError)."""
    if not overwrite:
        raise UserError(
            "DSR335",
            f"--output_dir {path}: the folder exists and is not empty. Resume its run: {_RESUME} auto; "
            "start a new one: another --output_dir, or --overwrite_output_dir to delete it",
        )
    # a mistyped --output_dir must not delete somebody's home directory
    if not RunFolder(path).config.is_file():
        raise UserError(
            "DSR336", f"--overwrite_output_dir: {path} is not a run folder (no config.yaml in it); delete it yourself"
        )


def find_checkpoints(requested: str, folder: RunFolder | None, say: Callable[[str], None]) -> list[Path]:
    """Checkpoints to resume from, best first; empty for `auto` where none exists yet.

    Only names and sizes are checked; checkpoint_integrity.find_damage checks what is in the files.

    Args:
        requested: `auto`, `step100`, a run folder, or the path of a checkpoint.
        folder: of the run; None where it has none yet.
        say: gets a line on each checkpoint that is passed over.

    Raises:
        UserError: no such checkpoint, or none that is complete.
    """
    if requested.lower() in ("auto", "true"):
        return _newest_first(folder, say) if folder else []
    if requested.startswith("step") and requested[4:].isdecimal():
        if folder is None:
            raise UserError(
                "DSR339", f"{_RESUME} {requested}: name the run with --output_dir, or give the checkpoint's path"
            )
        path = folder.checkpoints / f"{_PREFIX}{requested[4:]}"
    else:
        path = flag_path("resume_from_checkpoint", requested)
        # RUN/checkpoints means the run, and so does RUN below
        if path.name == "checkpoints":
            path = path.parent
        if path.name == "model" and (path.parent / "config.yaml").is_file():
            raise UserError(
                "DSR339", f"{_RESUME} {requested}: this is a run's trained model; its run folder is {path.parent}"
            )
        if (path / "checkpoints").is_dir():
            checkpoints = _newest_first(RunFolder(path), say)
            if checkpoints:
                return checkpoints
            path = path / "checkpoints"
    problem = find_problem(path)
    if problem:
        raise _unusable(requested, path, problem, folder)
    return [path]


def _unusable(requested: str, path: Path, problem: str, folder: RunFolder | None) -> UserError:
    """Why a requested checkpoint cannot be used, and which ones can."""
    if path.is_dir() and not (path / MANIFEST).exists() and not path.name.startswith("checkpoint"):
        problem = "neither a checkpoint nor a run folder (it has no manifest.json and no checkpoints/)"
    hint = "`auto` takes the newest complete one of --output_dir"
    if folder:
        steps = ", ".join(f"step{_step(path)}" for path in folder.complete_checkpoints())
        hint = f"complete ones of this run: {steps or 'none'}"
    location = "" if str(path) == requested else f"{path}: "
    return UserError("DSR339", f"{_RESUME} {requested}: {location}{problem}; {hint}")


def _newest_first(folder: RunFolder, say: Callable[[str], None]) -> list[Path]:
    """The complete checkpoints; newer ones that are incomplete are reported, since the user may expect their step."""
    # by step, never by time: clocks of machines differ, and copying changes times
    checkpoints = sorted(folder.all_checkpoints(), key=_step, reverse=True)
    problems = {path: find_problem(path) for path in checkpoints}
    complete = [path for path, problem in problems.items() if problem is None]
    for path, problem in problems.items():
        if problem and (not complete or _step(path) > _step(complete[0])):
            say(coded("DSR343", f"{'damaged':<10}{path}: {problem}; ignored"))
    if checkpoints and not complete:
        newest = checkpoints[0]
        raise UserError(
            "DSR340",
            f"{_RESUME}: no checkpoint of {folder.path} is complete ({newest.name}: {problems[newest]}). "
            "Start a new run in another --output_dir",
        )
    return complete


def find_run(name: str, *, ended: bool = True) -> RunFolder:
    """Find a run folder by its path, or by `last`: the newest under runs/ that ended with a model.

    Args:
        ended: refuse a run without model/; False for commands that an unfinished run is enough for.

    Raises:
        UserError: there is none, or it has no trained model.
    """
    if name == "last":
        runs = [RunFolder(path.parent) for path in Path("runs").glob("*/*/model")]
        # somebody else's folder may also have a subfolder named model
        runs = [run for run in runs if run.config.is_file()]
        if not runs:
            raise UserError("DSR341", "last: no finished run under runs/; train one, or give the path of a run folder")
        return max(runs, key=lambda run: run.model.stat().st_mtime)
    folder = RunFolder(user_path(name))
    if not folder.path.is_dir():
        raise UserError("DSR341", f"{name}: no such run folder; give the path of one, or `last`")
    if not folder.config.is_file():
        # RUN/model or RUN/checkpoints/checkpoint-5
        for parent in list(folder.path.absolute().parents)[:2]:
            if (parent / "config.yaml").is_file():
                raise UserError("DSR341", f"{name}: this is inside a run folder; give the run folder itself, {parent}")
        raise UserError("DSR341", f"{name}: not a run folder (no config.yaml in it); give the path of one, or `last`")
    if ended and not folder.model.is_dir():
        raise UserError(
            "DSR342",
            f"{name}: this run has no model yet; `dsrecipes train --config {folder.config} --output_dir {name} "
            f"{_RESUME} auto` resumes it",
        )
    return folder
