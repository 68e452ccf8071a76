"""Which message does the user get when memory, the disk or the cache fails in the middle of a run?"""

from __future__ import annotations

from dataclasses import dataclass

from safetensors import SafetensorError
from transformers import PreTrainedModel

from dsrecipes.config.schema import Config
from dsrecipes.errors import UserError
from dsrecipes.io.disk import is_disk_full
from dsrecipes.io.paths import cache_root
from dsrecipes.model.memory import is_out_of_memory
from dsrecipes.runs.folder import RunFolder
from dsrecipes.train.memory import load_of, out_of_memory
from dsrecipes.train.setup import RunSetup
from dsrecipes.train.trainer import RecipeTrainer

FAILURES = (OSError, RuntimeError, MemoryError, SafetensorError)
"""Errors that may have a cause outside the program."""


@dataclass
class Progress:
    """How far a run has come, for the message of a failure; None: not yet."""

    setup: RunSetup | None = None
    model: PreTrainedModel | None = None
    trainer: RecipeTrainer | None = None


def explain(error: BaseException, config: Config, progress: Progress, folder: RunFolder | None) -> UserError | None:
    """Compose the message for a failure that the user can fix; None for any other."""
    # before the check for a full disk: advice about --output_dir would not help with the cache
    if isinstance(error, OSError) and str(error.filename).startswith(str(cache_root())):
        return UserError(
            "DSR362",
            f"the cache {cache_root()} cannot be used: {error.strerror} ({error.filename}). Set DSRECIPES_CACHE to another "
            "folder",
        )
    # torch.OutOfMemoryError is a RuntimeError, as is much else
    if is_out_of_memory(error) and progress.setup is not None:
        trainer = progress.trainer
        where = f"in step {trainer.state.global_step + 1}" if trainer else "while the model was loaded"
        load = load_of(config, progress.setup, progress.model)
        return UserError("DSR363", out_of_memory(load, progress.setup.ranks.rank, error, where))
    if folder is not None and is_disk_full(error, folder.path):
        return UserError(
            "DSR364",
            f"--output_dir {folder.path}: no space left on the disk to save into. Free some, and give the same command with "
            "--resume_from_checkpoint auto; --save_total_limit 1 needs less",
        )
    return None
