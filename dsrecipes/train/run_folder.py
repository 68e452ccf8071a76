"""Which folder does a run write to, and which checkpoints may it resume from? Decided before anything is written there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dsrecipes.config.schema import Config
from dsrecipes.errors import UserError
from dsrecipes.io.paths import flag_path
from dsrecipes.launch.environment import Ranks
from dsrecipes.launch.signals import StopSignals
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.runs.checkpoint_integrity import find_damage, first_intact
from dsrecipes.runs.folder import RunFolder, check_output, default_path, find_checkpoints
from dsrecipes.train.setup import RunSetup

PATIENCE = 30
"""Seconds to wait for another process to leave the run folder; the ranks of a dead launcher may need some."""
_REPLACED = ".replaced"
"""Holds, inside a run folder, what --overwrite_output_dir is to delete, until the run can start."""
_BUSY = "busy"


def choose_folder(config: Config, setup: RunSetup, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """Choose the run folder where it is named, and the checkpoints to resume from, best first.

    Raises:
        UserError: the folder must not be written, or there is no such checkpoint, or none that fits these ranks.
    """
    requested, resume = config.train["output_dir"], config.train["resume_from_checkpoint"]
    path = flag_path("output_dir", requested) if requested else None
    auto = resume is not None and resume.lower() in ("auto", "true")
    if auto and path is None:
        raise UserError(
            "DSR357", "--resume_from_checkpoint auto: name the run with --output_dir, which stays the same on every start"
        )
    candidates = find_checkpoints(resume, RunFolder(path) if path else None, say) if resume else []
    checkpoint = candidates[0] if candidates else None
    # a checkpoint is in RUN/checkpoints/: without --output_dir, the run resumes in its own folder
    if checkpoint and path is None:
        path = checkpoint.parent.parent
    if checkpoint:
        setup.check_checkpoint(checkpoint, config.train)
    # rank 0 alone, which creates the folder
    if setup.ranks.rank == 0 and not config.train["dry_run"]:
        overwrite = config.train["overwrite_output_dir"]
        resumes = path is None or _resumes_in(path, config, candidates)
        if overwrite and path and not resumes:
            _refuse_own_inputs(path, config)
        check_output(path or Path("runs"), resuming=resumes, overwrite=overwrite)
    return path, candidates


def _resumes_in(path: Path, config: Config, candidates: list[Path]) -> bool:
    """Whether the run resumes in this folder, which is then never deleted."""
    auto = str(config.train["resume_from_checkpoint"]).lower() in ("auto", "true")
    return auto or any(checkpoint.resolve().is_relative_to(path.resolve()) for checkpoint in candidates[:1])


def _refuse_own_inputs(path: Path, config: Config) -> None:
    """Refuse to delete a folder that holds an input of the run (UserError)."""
    sources = (*config.data.sources, *config.data.eval_sources)
    inputs = [
        config.model.model_name_or_path,
        *(source.path for source in sources),
        config.train["deepspeed"],
        config.layers.recipe.module,
        *(layer.origin for layer in config.layers.layers),
    ]
    for name in inputs:
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
            raise UserError(
                "DSR358", f"--overwrite_output_dir would delete {name}, which this run reads; choose another --output_dir"
            )


@dataclass(frozen=True)
class ClaimedFolder:
    """A run folder that no other process can write to until it is released."""

    folder: RunFolder
    lock: FileLock | None
    """None in a dry run, whose folder is temporary."""
    is_new: bool
    """Whether this run made it."""

    def release(self) -> None:
        """Let other processes in."""
        if self.lock is not None:
            self.lock.release()

    def restore(self) -> None:
        """Undo what a run did to its folder when it is refused before it starts: delete a new one, restore an old one.

        The corrected command then needs no other --output_dir.
        """
        replaced = self.folder.path / _REPLACED
        if self.is_new:
            shutil.rmtree(self.folder.path, ignore_errors=True)
        elif replaced.is_dir():
            for path in self.folder.path.iterdir():
                if path in (replaced, self.folder.lock):
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            _move(replaced, self.folder.path)
            replaced.rmdir()

    def delete_replaced(self) -> None:
        """Delete what --overwrite_output_dir set aside."""
        shutil.rmtree(self.folder.path / _REPLACED, ignore_errors=True)


def claim_folder(
    named: Path | None, candidates: list[Path], config: Config, signals: StopSignals, main: bool
) -> ClaimedFolder:
    """Agree with the other ranks on the run folder, and lock other processes out of it.

    With --overwrite_output_dir, what the folder holds is set aside until the run can start.

    Raises:
        UserError: another process trains in it, or it cannot be written; the same on all ranks.
    """
    if config.train["dry_run"]:
        return ClaimedFolder(RunFolder(Path(tempfile.mkdtemp(prefix="dsrecipes-dry-run-"))), None, is_new=True)
    # rank 0's: a default path has the time in it, which differs between ranks
    folder = RunFolder(signals.all_gather(named or default_path(config.layers.recipe.name))[0])
    lock, is_new = FileLock(folder.lock), not folder.path.exists()
    empty = bool(config.train["overwrite_output_dir"]) and not _resumes_in(folder.path, config, candidates)
    # as a value, not an exception: the other ranks wait in this collective for it
    problem = signals.all_gather(_lock(folder, lock, empty) if main else None)[0]
    if problem == _BUSY:
        raise UserError(
            "DSR359",
            f"--output_dir {folder.path}: another process trains in this folder; wait for it, end it, or name another folder",
        )
    if problem:
        raise UserError("DSR360", f"--output_dir {folder.path} cannot be written: {problem}")
    return ClaimedFolder(folder, lock, is_new=main and is_new)


def _lock(folder: RunFolder, lock: FileLock, empty: bool) -> str | None:
    """Create and lock the folder; returns what prevents it, which all ranks then raise."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
        # a rename costs nothing, and a run that is refused later can be undone by the reverse
        if empty:
            _move(folder.path, folder.path / _REPLACED)
        # the fault of an earlier start would end this one at once
        Watchdog.remove_records(folder.path)
    except Timeout:
        return _BUSY
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def _move(source: Path, target: Path) -> None:
    """Move everything in a folder into another one, except the lock and the other folder itself."""
    target.mkdir(exist_ok=True)
    for path in list(source.iterdir()):
        if path != target and path.name != RunFolder(source).lock.name:
            path.rename(target / path.name)


def choose_checkpoint(candidates: list[Path], ranks: Ranks, signals: StopSignals, say: Callable[[str], None]) -> Path | None:
    """Choose the first undamaged candidate; a collective call.

    Each rank checks a part of the files, and all get the same result.
    """
    # a checkpoint may have been completed between two looks, or a disk show it to one machine only
    candidates = signals.all_gather(candidates)[0]

    def find_on_all_ranks(checkpoint: Path) -> str | None:
        # hashing is bound by one core, so ranks share it
        problems = signals.all_gather(find_damage(checkpoint, ranks.rank, ranks.world))
        return next((problem for problem in problems if problem), None)

    return first_intact(candidates, find_on_all_ranks, say) if candidates else None
