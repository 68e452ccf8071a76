"""How does a run that stopped anywhere continue as if it had not?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from dsrecipes.errors import RunStopped, UserError
from dsrecipes.runs.checkpoint_integrity import find_damage
from dsrecipes.runs.checkpoint_manifest import find_problem, is_complete
from dsrecipes.train.evaluating import EvaluationInterrupted
from dsrecipes.train.saving import CheckpointWriter, read_progress, step_number
from dsrecipes.zero import restore
from dsrecipes.zero.checkpoint_states import loads_directly, read_writer


class Resumer(TrainerCallback):
    """Loads a checkpoint, also one of another number of ranks or ZeRO stage, and restores what Trainer does not save."""

    def __init__(self, trainer: Trainer, writer: CheckpointWriter) -> None:
        """Set up; `begin` starts resuming."""
        self.trainer, self.writer, self.context = trainer, writer, writer.context
        self._checkpoint: Path | None = None
        self._progress: dict[str, Any] | None = None
        """progress.json of the checkpoint, until it is restored."""
        self._seeds_after_batch = False

    def begin(self, checkpoint: Path) -> None:
        """Resume from this checkpoint when training begins."""
        self._checkpoint, self._progress = checkpoint, read_progress(checkpoint)
        # the step that it starts from needs no save
        self.writer.saved_step = step_number(checkpoint)

    # ---- loading ----

    def must_reshard(self, checkpoint: str | None) -> bool:
        """Whether other ranks or another ZeRO stage wrote a checkpoint, so that its states must be resharded."""
        return checkpoint is not None and not loads_directly(read_writer(Path(checkpoint)), self.context.made_by)

    def reshard(self, checkpoint: Path) -> None:
        """Load a checkpoint that must be resharded into the started engine."""
        trainer = self.trainer
        engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
        # 0 before training: Trainer reads its state only after the engine's
        step = trainer.state.global_step or step_number(checkpoint)
        assert trainer.model is not None
        restore.load(trainer.model, engine, trainer.optimizer, trainer.lr_scheduler, step, checkpoint)

    def engine_started(self, checkpoint: str | None) -> None:
        """Complete what Trainer's own loading leaves out, once engine and optimizer exist."""
        if checkpoint is not None and self.must_reshard(checkpoint):
            self.reshard(Path(checkpoint))
        # only where a change was allowed: otherwise the values are equal, and the loaded ones exact
        if self._progress is not None and self.context.changed:
            self._apply_changed_settings()

    def _apply_changed_settings(self) -> None:
        """Give the optimizer this run's settings again, which loading replaced by the checkpoint's."""
        args: Any = self.trainer.args
        scheduler: Any = self.trainer.lr_scheduler
        lambdas = getattr(scheduler, "lr_lambdas", None)
        optimizer: Any = self.trainer.optimizer
        for index, group in enumerate(optimizer.param_groups):
            group |= {
                "initial_lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
            }
            # biases and norms do not decay; Trainer makes the group that does first
            if group["weight_decay"] or index == 0:
                group["weight_decay"] = args.weight_decay
            if lambdas:
                scheduler.base_lrs[index] = args.learning_rate
                group["lr"] = args.learning_rate * lambdas[index](scheduler.last_epoch)

    def check_best(self, best: Path) -> None:
        """Check the files of the best checkpoint before it is loaded; a collective call (UserError: it is damaged)."""
        args = self.trainer.args
        problem = find_problem(best) or find_damage(best, args.process_index, args.world_size)
        problem = next((text for text in self.context.signals.all_gather(problem) if text), None)
        if problem:
            raise UserError("DSR370", f"--load_best_model_at_end: {best}: {problem}")

    # ---- state ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore what Trainer's state lacks; the last callback to do so, since it may evaluate."""
        if state.best_global_step:
            # where it is now: the run folder may have moved, or the run resumes in another one
            paths = [self.context.path(state.best_global_step)]
            if self._checkpoint is not None:
                paths.append(self._checkpoint.with_name(paths[0].name))
            state.best_model_checkpoint = next((str(path) for path in paths if is_complete(path)), None)
        states: Any = state.stateful_callbacks
        for callback in (*self.trainer.callback_handler.callbacks, self.trainer.control):
            if isinstance(callback, ExportableState):  # the checkpoint may be of a run without it
                states.setdefault(type(callback).__name__, callback.state())
        self._catch_up()

    def _catch_up(self) -> None:
        """Restore the losses since the last log line, and evaluate if that was due when the checkpoint was saved.

        Raises:
            RunStopped: the run had to stop during that evaluation, which is then still due.
        """
        trainer = self.trainer
        progress, self._progress = self._progress, None
        if progress is None:
            return
        losses = progress["losses"]
        same_ranks = len(losses) == trainer.args.world_size
        # each rank has a sum of its own; Trainer logs their mean, which the mean on every rank keeps
        loss = losses[trainer.args.process_index] if same_ranks else sum(losses) / len(losses)
        trainer._tr_loss.fill_(loss)
        trainer._globalstep_last_logged = progress["last_logged"]
        if not progress["evaluate"]:
            return
        try:
            metrics = trainer._evaluate(None, None)
        except EvaluationInterrupted:
            raise RunStopped(self.writer.farewell()) from None
        is_best = trainer._determine_best_metric(metrics, None)
        if is_best and trainer.args.save_strategy == SaveStrategy.BEST:
            trainer._save_checkpoint(trainer.model_wrapped, None)

    def has_ended(self) -> bool:
        """Whether a resumed run is at its end already, where Trainer would take one more step."""
        state = self.trainer.state
        return state.global_step >= state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.trainer.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )

    # ---- random numbers ----

    def epoch_begins(self, resumes_here: bool, skipped_batches: int) -> None:
        """Seed a rank that the checkpoint has no random numbers of, at the moment where Trainer restores those of others.

        Args:
            resumes_here: whether the run resumes in this epoch.
            skipped_batches: of this epoch; Trainer restores random numbers after it has read over them.
        """
        if not resumes_here or self._checkpoint is None:
            return
        args = self.trainer.args
        name = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
        if (self._checkpoint / name).is_file():
            return
        if skipped_batches:
            self._seeds_after_batch = True
        else:
            self._seed()

    def batch_read(self) -> None:
        """Seed this rank now, if that waited for the first batch."""
        if self._seeds_after_batch:
            self._seeds_after_batch = False
            self._seed()

    def _seed(self) -> None:
        """Give this rank random numbers of its own, the same on each resume from this checkpoint."""
        args = self.trainer.args
        # the seed alone would repeat the numbers of the first steps, and give all new ranks the same ones
        entropy = (args.seed, self.trainer.state.global_step, args.process_index)
        set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
