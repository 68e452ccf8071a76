"""Which folder a run has and which checkpoints it may go on from, settled before anything is written there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from dsrecipes.config.schema import Config
from dsrecipes.errors import UserError
from dsrecipes.io.paths import flag_path
from dsrecipes.launch.signals import StopSignals
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.runs.folder import RunFolder, check_output, default_path, find_checkpoints
from dsrecipes.train.setup import RunSetup

PATIENCE = 30
"""Seconds to wait for another process to leave the run folder; the ranks of a dead launcher may need some."""


_REPLACED = ".replaced"
"""Holds, inside a run folder, what --overwrite_output_dir is to delete."""


def choose_folder(config: Config, place: RunSetup, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """The run folder where it is named, and the checkpoints to go on from, best first.

    Raises:
        UserError: the folder may not be written, or there is no such checkpoint, or none that fits these ranks.
    """
    asked, resume = config.train["output_dir"], config.train["resume_from_checkpoint"]
    path = flag_path("output_dir", asked) if asked else None
    auto = resume is not None and resume.lower() in ("auto", "true")
    if auto and path is None:
        raise UserError("--resume_from_checkpoint auto: name the run with --output_dir, which stays the same on every start")
    found = find_checkpoints(resume, RunFolder(path) if path else None, say) if resume else []
    checkpoint = found[0] if found else None
    if checkpoint and path is None:
        path = checkpoint.parent.parent
    if checkpoint:
        place.check_checkpoint(checkpoint, config.train)
    if place.ranks.rank == 0 and not config.train["dry_run"]:
        overwrite = config.train["overwrite_output_dir"]
        if overwrite and path and not _resumes_in(path, config, found):
            _refuse_own_inputs(path, config)
        check_output(path or Path("runs"), resuming=path is None or _resumes_in(path, config, found), overwrite=overwrite)
    return path, found


def _resumes_in(path: Path, config: Config, found: list[Path]) -> bool:
    """Whether the run resumes in this folder, which is then never deleted."""
    auto = str(config.train["resume_from_checkpoint"]).lower() in ("auto", "true")
    return auto or any(checkpoint.resolve().is_relative_to(path.resolve()) for checkpoint in found[:1])


def _refuse_own_inputs(path: Path, config: Config) -> None:
    """Refuse to delete a folder that holds what the run reads (UserError)."""
    layers = config.layers
    inputs = [
        config.model.model_name_or_path, *(source.path for source in (*config.data.sources, *config.data.eval_sources)),
        config.train["deepspeed"],
        layers.recipe.module, *(layer.origin for layer in layers.layers),
    ]  # fmt: skip
    for name in inputs:
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
            raise UserError(f"--overwrite_output_dir would delete {name}, which this run reads; choose another --output_dir")


def take_folder(
    named: Path | None, found: list[Path], config: Config, orders: StopSignals, main: bool
) -> tuple[RunFolder, FileLock | None, bool]:
    """Agree with the other ranks on the run folder, and keep other processes out of it until the lock is released.

    With --overwrite_output_dir, what the folder holds is set aside until the run can start.

    Returns:
        The folder, its lock, and whether this run made it.

    Raises:
        UserError: another process trains in it, or it cannot be written; the same on all ranks.
    """
    if config.train["dry_run"]:
        return RunFolder(Path(tempfile.mkdtemp(prefix="dsrecipes-dry-run-"))), None, True
    folder = RunFolder(orders.all_gather(named or default_path(config.layers.recipe.name))[0])
    lock, is_new = FileLock(folder.lock), not folder.path.exists()
    empty = bool(config.train["overwrite_output_dir"]) and not _resumes_in(folder.path, config, found)
    problem = orders.all_gather(_locked(folder, lock, empty) if main else None)[0]
    if problem:
        raise UserError(problem)
    return folder, lock, main and is_new


def _locked(folder: RunFolder, lock: FileLock, empty: bool) -> str | None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
        if empty:
            _move(folder.path, folder.path / _REPLACED)
        Watchdog.remove_records(folder.path)
    except Timeout:
        return f"--output_dir {folder.path}: another process trains in this folder; wait for it, end it, or name another"
    except OSError as error:
        return f"--output_dir {folder.path} cannot be written: {error.strerror}"
    return None


def _move(source: Path, target: Path) -> None:
    """Move all that a folder holds into another one, but for the lock and the other folder itself."""
    target.mkdir(exist_ok=True)
    for path in list(source.iterdir()):
        if path != target and path.name != RunFolder(source).lock.name:
            path.rename(target / path.name)


def leave_folder(folder: RunFolder, is_new: bool) -> None:
    """Undo what a run did to its folder when it is refused before it starts: delete a new one, restore an old one."""
    replaced = folder.path / _REPLACED
    if is_new:
        shutil.rmtree(folder.path, ignore_errors=True)
    elif replaced.is_dir():
        for path in folder.path.iterdir():
            if path not in (replaced, folder.lock):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _move(replaced, folder.path)
        replaced.rmdir()


def delete_replaced(folder: RunFolder) -> None:
    """Delete what --overwrite_output_dir set aside."""
    shutil.rmtree(folder.path / _REPLACED, ignore_errors=True)
