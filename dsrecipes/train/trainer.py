"""Which rows does a rank train on in a step, how is their loss divided, and what is logged?

One subclass of transformers.Trainer for all recipes. It delegates: checkpoints to saving.py, resuming to resuming.py, the
evaluation loop to evaluating.py. Its overrides of private methods are listed in private_surface.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from dsrecipes.data.stream import Stream
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import RunStopped, coded
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.model.task import is_causal_lm
from dsrecipes.train.evaluating import EvaluationInterrupted, Evaluator
from dsrecipes.train.loaders import check_weights, make_loader
from dsrecipes.train.losses import StepLoss
from dsrecipes.train.model_files import saved_as_pretrained
from dsrecipes.train.phases import PhaseReporter
from dsrecipes.train.resuming import Resumer
from dsrecipes.train.saving import CheckpointContext, CheckpointWriter
from dsrecipes.train.speed import SpeedMeter
from dsrecipes.train.step_end import StepEnd

Items = torch.Tensor | int | None  # what divides the loss of a step


class RecipeTrainer(Trainer):
    """Trainer over Sequences: rows of a step depend on seed and step alone, evaluation loss is a sum over labels.

    Where rows have weights, a step's loss is divided by the sum of the weights of its labels, over micro batches and ranks,
    instead of by their number, so that a row of weight 2 has the gradient of the row given twice.
    """

    # declared again because Trainer allows None for them, and a run always has them
    model: PreTrainedModel
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def __init__(
        self, *, model: PreTrainedModel, watchdog: Watchdog, context: CheckpointContext, weighted: bool, **kwargs: Any
    ) -> None:
        """Build the trainer; the engine starts with training.

        Args:
            model: as the recipe loaded it.
            watchdog: of this rank.
            context: where checkpoints go.
            weighted: whether rows have weights.
            kwargs: Trainer's own.
        """
        self.causal: bool = is_causal_lm(model)
        if self.causal:
            # the evaluation would keep the logits of all validation tokens
            kwargs["compute_metrics"] = None
        else:
            # Trainer infers this from **kwargs in forward(), but a classifier's own loss ignores num_items_in_batch
            untyped: Any = model
            untyped.accepts_loss_kwargs = False
        self.step_loss = StepLoss(model, self.causal, weighted)
        super().__init__(model=model, compute_loss_func=self.step_loss.function, **kwargs)
        self.watchdog, self.context = watchdog, context
        # Trainer's own limit would count damaged checkpoints too
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.writer = CheckpointWriter(self, context, limit)
        self.resumer = Resumer(self, self.writer)
        self.evaluator = Evaluator(self, watchdog, context, self.causal)
        self.add_callback(PhaseReporter(watchdog))
        self.step_end, self.meter = StepEnd(self, self.writer), SpeedMeter()
        self._learning_rate = 0.0
        self.batches: list[dict[str, torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []
        """The micro batches of this step, and their losses."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train, from a checkpoint if one is given.

        Raises:
            RunStopped: a signal or the time limit ended the run; it is saved.
        """
        if isinstance(resume_from_checkpoint, str):
            self.resumer.begin(Path(resume_from_checkpoint))
            self.args.eval_on_start = False
        self.add_callback(self.resumer)  # the last one, because it may evaluate, which the others then report
        with self.context.signals:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.writer.owes_save:
            text = f"step {self.state.global_step} is in no checkpoint: there was no room for one"
            self.context.say(coded("DSR368", f"warning   {text}"))
        return output

    # ---- rows of a step ----

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro batches, in step order."""
        args, shuffle = self.args, self.args.train_sampling_strategy == "random"
        return make_loader(self.train_dataset, args.train_batch_size, args, self.data_collator, shuffle=shuffle)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's part of the evaluation rows; every rank has as many batches."""
        data: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        return make_loader(data, self.args.eval_batch_size, self.args, self.data_collator, accumulation=1)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Items]:
        """A step's micro batches, and what divides their loss."""
        self.watchdog.enter("reading rows", self.state.global_step + 1)
        self.meter.clock.start()
        self._learning_rate = float(self.optimizer.param_groups[0]["lr"])
        batches = list(islice(epoch_iterator, num_batches))
        self.resumer.batch_read()
        countable = self.step_loss.begin_step(batches, self.args)
        divisor: Items = self.step_loss.total_weight(device)
        if divisor is None:
            divisor = self._get_num_items_in_batch(countable, device)
        if batches and isinstance(self.train_dataset, Stream):
            check_weights(self.train_dataset, batches[0])
        self.meter.count(batches)
        self.batches, self.losses = batches, []
        return batches, divisor

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device; numbers to learn stay in fp32, which Trainer would round to the engine's dtype."""
        exact = {
            name: value.to(self.args.device)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        return {**super()._prepare_inputs(inputs), **exact}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Items = None) -> torch.Tensor:
        """Forward and backward of a micro batch, whose loss is kept until the step ends."""
        self.watchdog.enter("forward")
        self.losses.append(super().training_step(model, inputs, num_items_in_batch))
        return self.losses[-1]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> Any:
        """The loss; when the model trains, the backward pass comes next."""
        # Trainer pops the labels out of `inputs`, and the loss function gets neither weights nor inputs
        self.step_loss.inputs = dict(inputs)
        inputs.pop(WEIGHTS, None)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.watchdog.enter("backward")
        return loss

    # ---- checkpoints ----

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None) -> Any:
        """Start engine and optimizer; a checkpoint of other ranks or another stage is resharded instead of loaded."""
        loadable = None if self.resumer.must_reshard(resume_from_checkpoint) else resume_from_checkpoint
        result = super()._prepare_for_training(max_steps, train_dataloader, loadable)
        self.resumer.engine_started(resume_from_checkpoint)
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights before the engine starts, unless they are resharded afterwards."""
        if not self.resumer.must_reshard(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights, once its files are checked."""
        self.watchdog.enter("finishing")  # the watchdog allows this phase as much time as it needs
        best = str(self.state.best_model_checkpoint)
        self.resumer.check_best(Path(best))
        if self.resumer.must_reshard(best):
            self.resumer.reshard(Path(best))
        else:
            super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save atomically; the time it takes is not counted as training."""
        self.watchdog.enter("saving")
        with self.meter.clock.paused():
            self.writer.save(lambda: super(RecipeTrainer, self)._save_checkpoint(model, trial), model)
        self.watchdog.enter("between steps")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model as any Hugging Face model, without training_args.bin (a pickle)."""
        folder = str(output_dir or self.args.output_dir)
        with self.writer.collect_errors(), saved_as_pretrained(self.model, Path(folder), state_dict):
            super()._save(folder, state_dict)

    def _run_epoch(
        self,
        model: nn.Module,
        epoch: int,
        train_dataloader: DataLoader,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
    ) -> None:
        """Train an epoch, unless a resumed run is at its end already."""
        if self.resumer.has_ended():
            self.control.should_training_stop = True
            return
        self.resumer.epoch_begins(epoch == epochs_trained, steps_trained_in_current_epoch)
        super()._run_epoch(
            model,
            epoch,
            train_dataloader,
            steps_in_epoch,
            num_update_steps_per_epoch,
            trial,
            ignore_keys_for_eval,
            start_time,
            resume_from_checkpoint,
            epochs_trained,
            steps_trained_in_current_epoch,
        )

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Log, evaluate and save as all ranks agree, and stop where a signal or the time limit says so (RunStopped)."""
        self.step_end.decide(grad_norm)
        save_is_due = self.control.should_save
        try:
            super()._maybe_log_save_evaluate(
                tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
            )
            if save_is_due and not self.writer.owes_save:
                # saves nothing twice; --save_strategy best forgets other reasons to save
                self._save_checkpoint(model, trial)
        except EvaluationInterrupted:
            self.writer.owes_evaluation = True
            self._save_checkpoint(model, trial)
        if self.context.signals.leaving:
            raise RunStopped(self.writer.farewell())

    # ---- evaluation and log ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; the time it takes is not counted as training. The figures are empty if it fails, which is reported."""
        evaluate = super().evaluate
        with self.meter.clock.paused():
            return self.evaluator.guarded(lambda: evaluate(eval_dataset, ignore_keys, metric_key_prefix))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate a split, see evaluating.py."""
        return self.evaluator.run(dataloader, metric_key_prefix)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the evaluation is the best one; one that failed is not (UserError: it has no such figure)."""
        if not metrics:
            return False
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            if self.control.should_save:
                self._save_checkpoint(self.model_wrapped, trial)  # the run can resume with another figure
            raise self.evaluator.no_such_figure(metrics, self.writer.last_complete()) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed (useful tokens and rows of all ranks, over training time alone) and the greatest peak memory."""
        logs.pop("total_flos", None)
        if "loss" in logs:
            logs |= self.meter.figures(self.args)
            router_loss = self.step_loss.pop_router_loss(self.args)
            if router_loss is not None:
                logs["router_loss"] = router_loss
            # of the step itself: with an optimizer block in the ZeRO JSON, Trainer reads the next step's
            logs["learning_rate"] = self._learning_rate
        super().log(logs, start_time)
