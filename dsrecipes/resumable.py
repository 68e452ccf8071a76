"""transformers.Trainer, made so that a run which stops anywhere goes on as if it had not."""

from __future__ import annotations

import contextlib
import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, IntervalStrategy, Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from dsrecipes.errors import RunStopped, UserError
from dsrecipes.runs.checkpoint import Facts, damage, facts_of, fault, files_of, is_whole, seal
from dsrecipes.runs.disk import is_write_error, no_room, put_in_place
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.orders import Orders
from dsrecipes.zero import reshape
from dsrecipes.zero.saved import fits, made_by

_PROGRESS = "progress.json"
"""What Trainer keeps between two steps and does not save."""


@dataclass
class Keeping:
    """Where a run's checkpoints lie, and what is written into each beside the training's state."""

    run: RunFolder
    made_by: dict[str, Any]
    contract: dict[str, Any]
    orders: Orders
    say: Callable[[str], None]
    changed: list[str] = field(default_factory=list)
    """Terms that a resumed run was allowed to change."""


def step_of(checkpoint: Path) -> tuple[int, bool]:
    """The step that a checkpoint was saved at, and whether its evaluation was still due."""
    progress = json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
    return int(checkpoint.name.rsplit("-", 1)[-1]), progress["evaluate"]


class EvaluationInterrupted(Exception):
    """Raised on all ranks between two batches of an evaluation when the run is to leave."""


class ResumableTrainer(Trainer):
    """Whole checkpoints, and what it takes to go on from one as if nothing had been."""

    def __init__(self, *, keeping: Keeping, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keeping = keeping
        self.at_step_end: Callable[[], Any] = keeping.orders.agree
        """Agrees with the other ranks on what a step was and what comes now, before it is logged, evaluated and saved."""
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer would count torn ones too
        self._saved_step = -1
        self._saved_bytes = 0
        self._failures: list[str] | None = None
        """Write errors of the save that is going on."""
        self._owes_save = False
        self._owes_evaluation = False
        self._ended_step = -1
        self._progress: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, from a checkpoint where one is given.

        Raises:
            RunStopped: a signal or the time limit ended the run; it is saved.
        """
        if resume_from_checkpoint:
            path = Path(resume_from_checkpoint)
            self._saved_step = int(path.name.rsplit("-", 1)[-1])
            self._progress = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
            self.args.eval_on_start = False
        with self.keeping.orders:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ---- going on ----

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Find the best checkpoint where it lies now: the run folder may have moved."""
        result = super()._init_training_state(*args)
        if self.state.best_global_step:
            best = self._path(self.state.best_global_step)
            self.state.best_model_checkpoint = str(best) if is_whole(best) else None
        for each in (*self.callback_handler.callbacks, self.control):
            if isinstance(each, ExportableState):
                self.state.stateful_callbacks.setdefault(type(each).__name__, each.state())
        return result

    def _made_elsewhere(self, checkpoint: str | None) -> bool:
        return checkpoint is not None and not fits(made_by(Path(checkpoint)), self.keeping.made_by)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None) -> Any:
        """Start engine and optimizer; a checkpoint of other ranks or another stage is divided anew."""
        elsewhere = self._made_elsewhere(resume_from_checkpoint)
        result = super()._prepare_for_training(max_steps, train_dataloader, None if elsewhere else resume_from_checkpoint)
        if elsewhere:
            reshape.load(self, Path(str(resume_from_checkpoint)))
        if self._progress is not None and self.keeping.changed:
            self._set_anew()
        return result

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
            self._owes_evaluation = ends and self.args.eval_strategy == IntervalStrategy.EPOCH
            self.control.should_save |= orders.saving or self._owes_save
            orders.saving = False
        elif self.control.should_evaluate:
            self._owes_evaluation = False
        if orders.leaving and self.control.should_evaluate:
            self.control.should_evaluate, self._owes_evaluation = False, True
        if orders.leaving:
            self.control.should_save = True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
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
        found = [each for each in orders.gathered(problem) if each]
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
            raise UserError(
                f"--metric_for_best_model {self.args.metric_for_best_model}: the evaluation has {', '.join(metrics)}"
            ) from error

    # ---- saving ----

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
        problem = orders.gathered(no_room(self.keeping.run.checkpoints, self._bytes_needed()) if main else None)[0]
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
        with _noting(getattr(model, "checkpoint_engine", None), self._note):
            super()._save_checkpoint(model, trial)
        best = self.state.best_global_step
        if best and (best == step or self._path(best).is_dir()):
            self.state.best_model_checkpoint = str(self._path(best))
        losses = orders.gathered(float(self._tr_loss))
        with self._note():
            if main:
                self.state.save_to_json(str(writing / TRAINER_STATE_NAME))
                progress = {"losses": losses, "last_logged": self._globalstep_last_logged, "evaluate": self._owes_evaluation}
                (writing / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        self._refuse_failures(step)
        part: Facts = {}
        with self._note():
            part = facts_of(writing, files_of(writing)[self.args.process_index :: self.args.world_size])
        facts = {name: fact for each in orders.gathered(part) for name, fact in each.items()}
        self._refuse_failures(step)
        self._saved_bytes = sum(size for size, _ in facts.values())
        with self._note():
            if main:
                seal(writing, facts, self.keeping.made_by, self.keeping.contract)
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
        found = [each for rank in self.keeping.orders.gathered(self._failures) for each in rank]
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
        if not self.limit:
            return
        whole = self.keeping.run.whole_checkpoints()
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
        sizes = [(getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in self.model.parameters()]
        trained = sum(count for count, _, grad in sizes if grad)
        written = sum(count * size for count, size, grad in sizes if grad or trained == sum(n for n, _, _ in sizes))
        return 2 * written + 12 * trained  # the model and the engine's copy; fp32 weights and two moments

    def last_whole(self) -> str:
        """Where the run can go on from after a failed save, in words."""
        whole = self.keeping.run.whole_checkpoints()
        if not whole:
            return "There is no whole checkpoint yet"
        last = whole[-1]
        return f"The last whole one is {last}: make room, and give the same command with --output_dir {self.keeping.run.path} --resume_from_checkpoint auto"

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights; its files are checked first."""
        best = Path(str(self.state.best_model_checkpoint))
        part = fault(best) or damage(best, self.args.process_index, self.args.world_size)
        problem = next((each for each in self.keeping.orders.gathered(part) if each), None)
        if problem:
            raise UserError(f"--load_best_model_at_end: {best}: {problem}")
        if self._made_elsewhere(str(best)):
            reshape.load(self, best)
        else:
            super()._load_best_model()

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
