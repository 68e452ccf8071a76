"""What does a checkpoint hold, and why is it either complete or not there?"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from dsrecipes.data.stream import Stream
from dsrecipes.errors import UserError, coded
from dsrecipes.io.disk import is_write_error, no_room, put_in_place
from dsrecipes.launch.signals import StopSignals
from dsrecipes.runs.checkpoint_manifest import FileFacts, hash_files, list_files, write_manifest
from dsrecipes.runs.folder import RunFolder
from dsrecipes.zero.internals import file_writer, full_numel

PROGRESS = "progress.json"
"""What Trainer keeps between two steps and does not save."""


@dataclass(frozen=True)
class CheckpointContext:
    """Where a run's checkpoints are, and what is written into each in addition to the training state."""

    folder: RunFolder
    made_by: dict[str, Any]
    """Ranks, ZeRO stage, sequences a step and hardware of the run that writes."""
    identity: dict[str, Any]
    """What defines the run (train/identity.py)."""
    signals: StopSignals
    say: Callable[[str], None]
    changed: list[str] = field(default_factory=list)
    """Terms of the identity that a resumed run was allowed to change."""

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder.checkpoints / f"checkpoint-{step}"


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint holds of a run's progress in addition to Trainer's own state."""
    return json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))


def step_number(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at, which is in its name."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def step_of(checkpoint: Path) -> tuple[int, bool]:
    """The step that a checkpoint was saved at, and whether its evaluation was still due."""
    return step_number(checkpoint), read_progress(checkpoint)["evaluate"]


class CheckpointWriter:
    """Writes checkpoints to a staging folder, seals them with a manifest, and only then gives them their names.

    A failed save costs no training: where the disk has no room, training continues and each further step tries again. A
    write error of one rank is collected and raised on all ranks at the same point, since a rank that raised at once would
    leave the others waiting in a collective.
    """

    def __init__(self, trainer: Trainer, context: CheckpointContext, limit: int | None) -> None:
        """Set up; `save` writes.

        Args:
            trainer: whose state is saved.
            context: of the run.
            limit: complete checkpoints to keep; None or below 1: all.
        """
        self.trainer, self.context, self.limit = trainer, context, limit
        self.saved_step = -1
        self.owes_save = False
        """Whether a save is due that the disk had no room for."""
        self.owes_evaluation = False
        """Whether the evaluation of this step comes after its save, which must remember it."""
        self._saved_bytes = 0
        self._failures: list[str] | None = None
        """Write errors of the current save; None outside a save."""

    def save(self, write_state: Callable[[], None], model: nn.Module) -> None:
        """Save on all ranks, unless this step is saved already; a collective call.

        Args:
            write_state: Trainer's own saving of model, optimizer, scheduler and random numbers.
            model: with the engine around it.

        Raises:
            UserError: writing failed half-way; the complete checkpoints are untouched.
        """
        step, context = self.trainer.state.global_step, self.context
        # Trainer, --save_strategy best, a signal and the end of an epoch may all ask for the same step
        if self.saved_step == step:
            return
        problem = None
        if self.trainer.is_world_process_zero():
            problem = no_room(context.folder.checkpoints, self._bytes_needed())
        # all ranks skip this save or none does, since writing is collective
        problem = context.signals.all_gather(problem)[0]
        if problem:
            if not self.owes_save:
                text = f"step {step} is not saved: {problem}. Training continues; each step tries again"
                context.say(coded("DSR368", f"warning   {text}"))
            self.owes_save = True
            return
        self._failures = []
        try:
            self._write(write_state, model, step)
        finally:
            self._failures = None
        self.owes_save, self.saved_step = False, step

    def _write(self, write_state: Callable[[], None], model: nn.Module, step: int) -> None:
        staged = self._staging / f"checkpoint-{step}"
        main = self.trainer.is_world_process_zero()
        with self.collect_errors():
            if main:
                self._clear_staging()
                staged.mkdir(parents=True)
        self._refuse_failures(step)
        with self.collect_errors(), self._staged_output(), _collecting(file_writer(model), self):
            write_state()
        self._write_progress(staged, step)
        # nothing may be written into the folder from here on
        facts = self._hash(staged, step)
        self._saved_bytes = sum(size for size, _ in facts.values())
        with self.collect_errors():
            if main:
                write_manifest(staged, facts, self.context.made_by, self.context.identity)
                # renamed last: whatever interrupts the save before leaves no folder of a checkpoint's name
                put_in_place(staged, self.context.path(step))
                self._staging.rmdir()
                self._remove_older(step)
        self._refuse_failures(step)

    @property
    def _staging(self) -> Path:
        return self.context.folder.checkpoints / "writing"

    def _clear_staging(self) -> None:
        """Delete what an interrupted save or removal left."""
        for leftover in (self._staging, *self._staging.parent.glob("removing-*")):
            shutil.rmtree(leftover, ignore_errors=True)

    @contextlib.contextmanager
    def _staged_output(self) -> Iterator[None]:
        """Let Trainer write below the staging folder: it saves into checkpoint-STEP of its output_dir."""
        args = self.trainer.args
        output_dir, args.output_dir = args.output_dir, str(self._staging)
        try:
            yield
        finally:
            args.output_dir = output_dir

    def _write_progress(self, staged: Path, step: int) -> None:
        """Write Trainer's state with the paths that hold after the staging folder is renamed, and progress.json."""
        trainer, state = self.trainer, self.trainer.state
        best = state.best_global_step
        if best and (best == step or self.context.path(best).is_dir()):
            state.best_model_checkpoint = str(self.context.path(best))
        # sums since the last log line, which differ between ranks
        losses = self.context.signals.all_gather(float(trainer._tr_loss))
        with self.collect_errors():
            if trainer.is_world_process_zero():
                state.save_to_json(str(staged / TRAINER_STATE_NAME))
                progress = {
                    "losses": losses,
                    "last_logged": trainer._globalstep_last_logged,
                    "evaluate": self.owes_evaluation,
                }
                if isinstance(trainer.train_dataset, Stream):
                    progress["stream"] = trainer.train_dataset.state(step)
                (staged / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        self._refuse_failures(step)

    def _hash(self, staged: Path, step: int) -> FileFacts:
        """Sizes and hashes of all files; each rank hashes a part of them."""
        args = self.trainer.args
        own: FileFacts = {}
        with self.collect_errors():
            # in turn, because neighbours in the sorted list are alike in size
            own = hash_files(staged, list_files(staged)[args.process_index :: args.world_size])
        parts: list[FileFacts] = self.context.signals.all_gather(own)
        self._refuse_failures(step)
        return {name: fact for part in parts for name, fact in part.items()}

    # ---- errors ----

    @contextlib.contextmanager
    def collect_errors(self) -> Iterator[None]:
        """Keep a write error for `_refuse_failures`, which raises it on all ranks; outside a save, let it through."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if self._failures is None or not is_write_error(error):
                raise
            # torch appends a C++ stack to the message
            self._failures.append(str(error).splitlines()[0])

    def _refuse_failures(self, step: int) -> None:
        """Raise the same UserError on all ranks if any of them could not write."""
        failures = [text for texts in self.context.signals.all_gather(self._failures) for text in texts]
        if failures:
            raise UserError("DSR369", f"checkpoint-{step} could not be saved: {failures[0]}. {self.last_complete()}")

    def last_complete(self) -> str:
        """Say where the run can resume from after a failed save."""
        folder = self.context.folder
        complete = folder.complete_checkpoints()
        if not complete:
            return "There is no complete checkpoint yet"
        return (
            f"The last complete one is {complete[-1]}: make room, and give the same command with --output_dir {folder.path} "
            "--resume_from_checkpoint auto"
        )

    def farewell(self) -> str:
        """Say why the run stops, what is saved and how it resumes."""
        state, folder = self.trainer.state, self.context.folder.path
        saved = "NOT saved: there was no room"
        if self.saved_step == state.global_step:
            saved = f"saved in {self.context.path(state.global_step)}"
        return (
            f"stopped by {self.context.signals.reason} at step {state.global_step} of {state.max_steps}, {saved}; "
            f"the same command with --output_dir {folder} --resume_from_checkpoint auto resumes"
        )

    # ---- room ----

    def _remove_older(self, newest: int) -> None:
        """Keep the newest checkpoints up to the limit, the best one among them; leave damaged ones alone."""
        # no limit, as transformers reads these values
        if self.limit is None or self.limit <= 0:
            return
        complete = self.context.folder.complete_checkpoints()
        best = self.trainer.state.best_global_step
        retained = {self.context.path(newest)}
        if best:
            retained.add(self.context.path(best))
        for path in reversed(complete):
            if len(retained) < self.limit:
                retained.add(path)
        for path in set(complete) - retained:
            # a removal that is interrupted half-way must not look like a damaged checkpoint
            removing = path.parent / f"removing-{step_number(path)}"
            with contextlib.suppress(OSError):
                path.rename(removing)
                shutil.rmtree(removing)

    def _bytes_needed(self) -> int:
        """Bytes of the next checkpoint: those of the last one, or before the first one an estimate.

        Model and engine each write the weights that are saved; the states of what is trained are fp32 weights and two
        moments, 12 bytes a parameter.
        """
        if self._saved_bytes:
            return self._saved_bytes
        parameters = list(self.trainer.model.parameters()) if self.trainer.model is not None else []
        counts = [full_numel(parameter) for parameter in parameters]
        trained = sum(count for parameter, count in zip(parameters, counts, strict=True) if parameter.requires_grad)
        # an adapter is saved without its base
        saves_all = trained == sum(counts)
        weights = sum(
            count * parameter.element_size()
            for parameter, count in zip(parameters, counts, strict=True)
            if parameter.requires_grad or saves_all
        )
        return 2 * weights + 12 * trained


@contextlib.contextmanager
def _collecting(engine: Any, writer: CheckpointWriter) -> Iterator[None]:
    """Collect the write errors of DeepSpeed's file writer, because its ranks wait for each other after writing."""
    if engine is None:
        yield
        return
    save = engine.save

    def save_and_collect(*args: Any, **kwargs: Any) -> None:
        with writer.collect_errors():
            save(*args, **kwargs)

    engine.save = save_and_collect
    try:
        yield
    finally:
        engine.save = save
