"""Which folder a run has and which checkpoints it may go on from, settled before anything is written there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from dsrecipes.config import Config
from dsrecipes.errors import UserError
from dsrecipes.find import flag_path
from dsrecipes.place import Place
from dsrecipes.runs.folder import RunFolder, check_output, default_path, find_checkpoints
from dsrecipes.runs.orders import Orders
from dsrecipes.runs.watch import Watch

PATIENCE = 30
"""Seconds to wait for another process to leave the run folder; the ranks of a dead launcher may need some."""


def choose_folder(config: Config, place: Place, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
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
        goes_on = auto or path is None or (checkpoint is not None and checkpoint.resolve().is_relative_to(path.resolve()))
        check_output(path or Path("runs"), resuming=goes_on, overwrite=config.train["overwrite_output_dir"])
    return path, found


def take_folder(named: Path | None, config: Config, orders: Orders, main: bool) -> tuple[RunFolder, FileLock | None]:
    """Agree with the other ranks on the run folder, and keep other processes out of it until the lock is released.

    Raises:
        UserError: another process trains in it, or it cannot be written; the same on all ranks.
    """
    if config.train["dry_run"]:
        return RunFolder(Path(tempfile.mkdtemp(prefix="dsrecipes-dry-run-"))), None
    folder = RunFolder(orders.gathered(named or default_path(config.layers.recipe.name))[0])
    lock = FileLock(folder.lock)
    problem = orders.gathered(_locked(folder, lock) if main else None)[0]
    if problem:
        raise UserError(problem)
    return folder, lock


def _locked(folder: RunFolder, lock: FileLock) -> str | None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
        Watch.forget(folder.path)
    except Timeout:
        return f"--output_dir {folder.path}: another process trains in this folder; wait for it, end it, or name another"
    except OSError as error:
        return f"--output_dir {folder.path} cannot be written: {error.strerror}"
    return None
