"""transformers.Trainer, made so that a run which stops anywhere goes on as if it had not."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, IntervalStrategy, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from dsrecipes.errors import RunStopped, UserError, nearest
from dsrecipes.runs.checkpoint_integrity import find_damage
from dsrecipes.runs.checkpoint_manifest import find_problem, is_complete
from dsrecipes.train.saving import SavingTrainer, read_progress, step_number
from dsrecipes.zero import restore
from dsrecipes.zero.checkpoint_states import loads_directly, read_writer


class EvaluationInterrupted(Exception):
    """Raised on all ranks between two batches of an evaluation when the run is to leave."""


class ResumableTrainer(SavingTrainer):
    """Whole checkpoints, and what it takes to go on from one as if nothing had been."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.at_step_end: Callable[[], Any] = self.keeping.orders.sync
        """Agrees with the other ranks on what a step was and what comes now, before it is logged, evaluated and saved."""
        self._ended_step = -1
        self._progress: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, from a checkpoint where one is given.

        Raises:
            RunStopped: a signal or the time limit ended the run; it is saved.
        """
        if resume_from_checkpoint:
            path = Path(resume_from_checkpoint)
            self._saved_step = step_number(path)
            self._progress = read_progress(path)
            self.args.eval_on_start = False
        with self.keeping.orders:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ---- going on ----

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Find the best checkpoint where it lies now: the run folder may have moved, or the run goes on in another."""
        result = super()._init_training_state(*args)
        if self.state.best_global_step:
            best, resumed = self._path(self.state.best_global_step), args[3]
            places = [best, *([Path(resumed).with_name(best.name)] if resumed else [])]
            self.state.best_model_checkpoint = next((str(path) for path in places if is_complete(path)), None)
        for each in (*self.callback_handler.callbacks, self.control):
            if isinstance(each, ExportableState):
                self.state.stateful_callbacks.setdefault(type(each).__name__, each.state())
        return result

    def _made_elsewhere(self, checkpoint: str | None) -> bool:
        return checkpoint is not None and not loads_directly(read_writer(Path(checkpoint)), self.keeping.made_by)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None) -> Any:
        """Start engine and optimizer; a checkpoint of other ranks or another stage is divided anew."""
        elsewhere = self._made_elsewhere(resume_from_checkpoint)
        result = super()._prepare_for_training(max_steps, train_dataloader, None if elsewhere else resume_from_checkpoint)
        if elsewhere:
            self._reshard(Path(str(resume_from_checkpoint)))
        if self._progress is not None and self.keeping.changed:
            self._set_anew()
        return result

    def _reshard(self, checkpoint: Path) -> None:
        """Load a checkpoint that other ranks, or another ZeRO stage, wrote."""
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        step = self.state.global_step or step_number(checkpoint)
        restore.load(self.model, engine, self.optimizer, self.lr_scheduler, step, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._made_elsewhere(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """This rank's random numbers; a rank that the checkpoint knows nothing of gets its own, the same each time."""
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is None or Path(checkpoint, name).is_file():
            super()._load_rng_state(checkpoint)
        else:
            place = (self.args.seed, self.state.global_step, self.args.process_index)
            set_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _set_anew(self) -> None:
        """Give the optimizer this run's settings again, which loading replaced by the checkpoint's."""
        args, scheduler = self.args, self.lr_scheduler
        lambdas = getattr(scheduler, "lr_lambdas", None)
        for index, group in enumerate(self.optimizer.param_groups):
            group |= {
                "initial_lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
            }
            if group["weight_decay"] or index == 0:  # Trainer makes the group that decays first
                group["weight_decay"] = args.weight_decay
            if lambdas:
                scheduler.base_lrs[index] = args.learning_rate
                group["lr"] = args.learning_rate * lambdas[index](scheduler.last_epoch)

    def _catch_up(self) -> None:
        """Restore the losses since the last log line, and evaluate where that was due when the checkpoint was saved."""
        progress, self._progress = self._progress, None
        if progress is None:
            return
        losses = progress["losses"]
        same = len(losses) == self.args.world_size
        self._tr_loss.fill_(losses[self.args.process_index] if same else sum(losses) / len(losses))
        self._globalstep_last_logged = progress["last_logged"]
        if progress["evaluate"]:
            best = self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            if best and self.args.save_strategy == SaveStrategy.BEST:
                self._save_checkpoint(self.model_wrapped, None)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train an epoch, unless a resumed run stands at its end already, where Trainer takes one step more."""
        self._catch_up()
        stopped = any(
            each.early_stopping_patience_counter >= each.early_stopping_patience
            for each in self.callback_handler.callbacks
            if isinstance(each, EarlyStoppingCallback)
        )
        if self.state.global_step >= self.state.max_steps or stopped:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _finalize_training(self, *args: Any) -> Any:
        self._catch_up()  # after the last epoch no further one begins
        if self._owes_save:
            self.keeping.say(f"warning   step {self.state.global_step} is in no checkpoint: there was no room for one")
        return super()._finalize_training(*args)

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights; its files are checked first."""
        best = Path(str(self.state.best_model_checkpoint))
        part = find_problem(best) or find_damage(best, self.args.process_index, self.args.world_size)
        problem = next((each for each in self.keeping.orders.all_gather(part) if each), None)
        if problem:
            raise UserError(f"--load_best_model_at_end: {best}: {problem}")
        if self._made_elsewhere(str(best)):
            self._reshard(best)
        else:
            super()._load_best_model()

    # ---- the end of a step ----

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:  # fmt: skip
        """Log, evaluate and save as the step asks, and leave where the run is told to.

        An evaluation that is due when the run leaves is made up for when it goes on, so that leaving is quick. The one at
        an epoch's end comes after a save at the epoch's last step, which must remember it.
        """
        orders = self.keeping.orders
        if self._ended_step != self.state.global_step:
            self._ended_step = self.state.global_step
            orders.step_ended()
            self.at_step_end()
            ends = float(self.state.epoch).is_integer() or self.state.global_step >= self.state.max_steps
            due = self.args.eval_delay <= self.state.epoch
            self._owes_evaluation = ends and due and self.args.eval_strategy == IntervalStrategy.EPOCH
            self.control.should_save |= orders.saving or self._owes_save
            orders.saving = False
        elif self.control.should_evaluate:
            self._owes_evaluation = False
        if orders.leaving and self.control.should_evaluate:
            self.control.should_evaluate, self._owes_evaluation = False, True
        if orders.leaving:
            self.control.should_save = True
        wanted = self.control.should_save
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            if wanted and not self._owes_save:
                self._save_checkpoint(model, trial)  # once a step; --save_strategy best forgets who else asked for it
        except EvaluationInterrupted:
            self._owes_evaluation = True
            self._save_checkpoint(model, trial)
        if orders.leaving:
            raise RunStopped(self._farewell())

    def _farewell(self) -> str:
        step, run = self.state.global_step, self.keeping.run.path
        saved = f"saved in {self._path(step)}" if self._saved_step == step else "NOT saved: there was no room"
        return (
            f"stopped by {self.keeping.orders.reason} at step {step} of {self.state.max_steps}, {saved}; "
            f"the same command with --output_dir {run} --resume_from_checkpoint auto goes on"
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; what fails there is told, and the training goes on. Whether a run evaluates changes no random number."""
        problem, metrics, orders = None, {}, self.keeping.orders
        try:
            with torch.random.fork_rng([torch.cuda.current_device()] if self.args.device.type == "cuda" else []):
                metrics = super().evaluate(*args, **kwargs)
        except EvaluationInterrupted:
            raise
        except Exception as error:
            traceback.print_exc()  # into the run's log
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        found = [each for each in orders.all_gather(problem) if each]
        if found:
            self.keeping.say(
                f"warning   the evaluation at step {self.state.global_step} failed ({found[0]}); log.txt has more"
            )
        return {} if found else metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the evaluation was the best; one that failed was not (UserError: it has no such figure)."""
        if not metrics:
            return False
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            if self.control.should_save:
                self._save_checkpoint(self.model_wrapped, trial)  # the run can be resumed with another figure
            name = self.args.metric_for_best_model
            raise UserError(
                f"--metric_for_best_model {name}: the evaluation has no such figure{nearest(name, metrics)}, but "
                f"{', '.join(metrics)}. {self.last_whole()}"
            ) from error
