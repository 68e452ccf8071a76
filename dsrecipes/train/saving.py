"""transformers.Trainer whose checkpoints are whole or not there, and whose failed saves cost no training."""

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
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from dsrecipes.config.adapter import CONFIG, HEAD, head_settings
from dsrecipes.data.stream import Stream
from dsrecipes.errors import UserError
from dsrecipes.io.disk import is_write_error, no_room, put_in_place
from dsrecipes.launch.signals import StopSignals
from dsrecipes.model.task import unwrapped
from dsrecipes.runs.checkpoint_manifest import FileFacts, hash_files, list_files, write_manifest
from dsrecipes.runs.folder import RunFolder
from dsrecipes.zero.internals import file_writer, full_numel

PROGRESS = "progress.json"
"""What Trainer keeps between two steps and does not save."""


@dataclass
class CheckpointContext:
    """Where a run's checkpoints lie, and what is written into each beside the training's state."""

    run: RunFolder
    made_by: dict[str, Any]
    contract: dict[str, Any]
    orders: StopSignals
    say: Callable[[str], None]
    changed: list[str] = field(default_factory=list)
    """Terms that a resumed run was allowed to change."""


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds of a run's progress beside Trainer's own state."""
    return json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))


def step_number(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at, which is in its name."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def step_of(checkpoint: Path) -> tuple[int, bool]:
    """The step that a checkpoint was saved at, and whether its evaluation was still due."""
    return step_number(checkpoint), read_progress(checkpoint)["evaluate"]


class SavingTrainer(Trainer):
    """Checkpoints written beside, sealed, and only then given their names."""

    def __init__(self, *, keeping: CheckpointContext, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keeping = keeping
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer would count torn ones too
        self._saved_step = -1
        self._saved_bytes = 0
        self._failures: list[str] | None = None
        """Write errors of the save that is going on."""
        self._owes_save = False
        self._owes_evaluation = False

    def _path(self, step: int) -> Path:
        return self.keeping.run.checkpoints / f"checkpoint-{step}"

    @property
    def _writing(self) -> Path:
        return self.keeping.run.checkpoints / "writing"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save on all ranks beside the other checkpoints, seal, give it its name, and only then remove older ones.

        Where there is no room the training goes on, and each further step tries again.

        Raises:
            UserError: writing failed half-way; the whole checkpoints are untouched.
        """
        step, orders = self.state.global_step, self.keeping.orders
        if self._saved_step == step:
            return
        main = self.is_world_process_zero()
        problem = orders.all_gather(no_room(self.keeping.run.checkpoints, self._bytes_needed()) if main else None)[0]
        if problem:
            if not self._owes_save:
                self.keeping.say(f"warning   step {step} is not saved: {problem}. Training goes on; each step tries again")
            self._owes_save = True
            return
        self._failures = []
        try:
            self._write(model, trial, step)
        finally:
            self._failures = None
        self._owes_save, self._saved_step = False, step

    def _write(self, model: nn.Module, trial: Any, step: int) -> None:
        orders, main, writing = self.keeping.orders, self.is_world_process_zero(), self._writing / f"checkpoint-{step}"
        with self._note():
            if main:
                for cut_off in (self._writing, *self._writing.parent.glob("removing-*")):
                    shutil.rmtree(cut_off, ignore_errors=True)
                writing.mkdir(parents=True)
        self._refuse_failures(step)
        with _noting(file_writer(model), self._note):
            super()._save_checkpoint(model, trial)
        best = self.state.best_global_step
        if best and (best == step or self._path(best).is_dir()):
            self.state.best_model_checkpoint = str(self._path(best))
        losses = orders.all_gather(float(self._tr_loss))
        with self._note():
            if main:
                self.state.save_to_json(str(writing / TRAINER_STATE_NAME))
                progress = {"losses": losses, "last_logged": self._globalstep_last_logged, "evaluate": self._owes_evaluation}
                if isinstance(self.train_dataset, Stream):
                    progress["stream"] = self.train_dataset.state(step)
                (writing / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        self._refuse_failures(step)
        part: FileFacts = {}
        with self._note():
            part = hash_files(writing, list_files(writing)[self.args.process_index :: self.args.world_size])
        facts = {name: fact for each in orders.all_gather(part) for name, fact in each.items()}
        self._refuse_failures(step)
        self._saved_bytes = sum(size for size, _ in facts.values())
        with self._note():
            if main:
                write_manifest(writing, facts, self.keeping.made_by, self.keeping.contract)
                put_in_place(writing, self._path(step))
                self._writing.rmdir()
                self._remove_older(step)
        self._refuse_failures(step)

    @contextlib.contextmanager
    def _note(self) -> Iterator[None]:
        """Keep a write error of a save for later: raised at once it would leave the other ranks waiting for this one."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if self._failures is None or not is_write_error(error):
                raise
            self._failures.append(str(error).splitlines()[0])

    def _refuse_failures(self, step: int) -> None:
        """Raise the same UserError on all ranks where any of them could not write."""
        found = [each for rank in self.keeping.orders.all_gather(self._failures) for each in rank]
        if found:
            raise UserError(f"checkpoint-{step} could not be saved: {found[0]}. {self.last_whole()}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._note():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._note():
            super()._save_rng_state(output_dir)

    def _remove_older(self, newest: int) -> None:
        """Keep the newest --save_total_limit whole checkpoints, the best one among them; leave torn ones alone."""
        if self.limit is None or self.limit <= 0:  # no limit, as for transformers
            return
        whole = self.keeping.run.complete_checkpoints()
        kept = {self._path(newest), *([self._path(self.state.best_global_step)] if self.state.best_global_step else [])}
        for path in reversed(whole):
            if len(kept) < self.limit:
                kept.add(path)
        for path in set(whole) - kept:
            gone = path.parent / f"removing-{path.name[11:]}"
            with contextlib.suppress(OSError):
                path.rename(gone)  # cut off half-way it would look like a torn checkpoint
                shutil.rmtree(gone)

    def _bytes_needed(self) -> int:
        """Bytes of the next checkpoint: those of the last one, or before the first one weights and states reckoned."""
        if self._saved_bytes:
            return self._saved_bytes
        sizes = [(full_numel(p), p.element_size(), p.requires_grad) for p in self.model.parameters()]
        trained = sum(count for count, _, grad in sizes if grad)
        written = sum(count * size for count, size, grad in sizes if grad or trained == sum(n for n, _, _ in sizes))
        return 2 * written + 12 * trained  # the model and the engine's copy; fp32 weights and two moments

    def last_whole(self) -> str:
        """Where the run can go on from after a failed save, in words."""
        whole = self.keeping.run.complete_checkpoints()
        if not whole:
            return "There is no whole checkpoint yet"
        last = whole[-1]
        return f"The last whole one is {last}: make room, and give the same command with --output_dir {self.keeping.run.path} --resume_from_checkpoint auto"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Leave out training_args.bin (a pickle), and give generation its cache back, which training turned off.

        ZeRO-3 gathers tied weights apart; made one tensor again, they are written once, as from every other stage.
        """
        for tied, source in getattr(self.model, "all_tied_weights_keys", {}).items():
            if state_dict and tied in state_dict and source in state_dict:
                state_dict[tied] = state_dict[source]
        config = self.model.config
        use_cache = getattr(config, "use_cache", None)
        if use_cache is not None:
            config.use_cache = True
        with self._note():
            super()._save(output_dir, state_dict)
            folder = Path(output_dir or self.args.output_dir)
            if type(unwrapped(self.model)).__name__.endswith("ForSequenceClassification") and (folder / CONFIG).is_file():
                settings = head_settings(unwrapped(self.model).config)
                (folder / HEAD).write_text(json.dumps(settings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if use_cache is not None:
            config.use_cache = use_cache
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def _noting(engine: Any, note: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Let DeepSpeed's writer of files note its errors, for its ranks wait for each other after writing."""
    if engine is None:
        yield
        return
    save = engine.save

    def noting(*args: Any, **kwargs: Any) -> None:
        with note():
            save(*args, **kwargs)

    engine.save = noting
    try:
        yield
    finally:
        engine.save = save
