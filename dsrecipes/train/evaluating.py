"""How is a model evaluated, so that the loss is the same for any batch size and number of ranks?"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput

from dsrecipes.data.collate import TOKEN_COUNTS, labelled
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import UserError, coded, nearest
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.train.saving import CheckpointContext

Predictions = tuple[np.ndarray, np.ndarray]
"""Logits and labels in row order."""


class EvaluationInterrupted(Exception):
    """Raised on all ranks between two batches of an evaluation when the run is to stop."""


class Evaluator:
    """Sums the loss over labels of all ranks, and then divides by their number.

    Trainer's own loop averages batch means and repeats rows to fill the last batch, so that its loss depends on the batch
    size. Where rows have weights, the loss is their weighted mean.
    """

    def __init__(self, trainer: Trainer, watchdog: Watchdog, context: CheckpointContext, causal: bool) -> None:
        """Set up; `run` evaluates.

        Args:
            trainer: whose model is evaluated.
            watchdog: of this rank.
            context: how ranks agree, and where failures are reported.
            causal: whether perplexity is reported.
        """
        self.trainer, self.watchdog, self.context, self.causal = trainer, watchdog, context, causal
        self.details: dict[str, dict] = {}
        """Figures of the last evaluation that are tables, such as accuracy by subject; they are not logged."""

    def run(self, dataloader: DataLoader, prefix: str) -> EvalLoopOutput:
        """Evaluate all sources of a split; a collective call.

        Args:
            dataloader: of the split.
            prefix: of the figures' names.
        """
        data: Any = dataloader.dataset
        loaders = dict.fromkeys(data.parts, dataloader)
        if len(data.parts) > 1:
            # one by one, since a batch with rows of two sources would have one loss for both
            loaders = {name: self.trainer.get_eval_dataloader(part) for name, part in data.parts.items()}
        results = {name: self._evaluate_source(loader) for name, loader in loaders.items()}
        self.watchdog.enter("computing metrics")
        sums_by_source = [sums for sums, _ in results.values()]
        metrics = self._loss_and_perplexity(sum(sums_by_source, torch.zeros_like(sums_by_source[0])))
        if self.trainer.compute_metrics is not None:
            predictions = [rows for _, rows in results.values() if rows is not None]
            logits, labels = (np.concatenate(arrays) for arrays in zip(*predictions, strict=True))
            metrics |= self.trainer.compute_metrics(EvalPrediction(logits, labels))
        for name, (sums, _) in results.items():
            if name:
                metrics |= {f"{name}_{key}": value for key, value in self._loss_and_perplexity(sums).items()}
        # log.jsonl, TensorBoard and trackers take numbers only
        self.details = {key: metrics.pop(key) for key in list(metrics) if isinstance(metrics[key], dict)}
        metrics = {f"{prefix}_{key}": value for key, value in metrics.items()}
        no_array: Any = None  # predictions are not kept
        return EvalLoopOutput(predictions=no_array, label_ids=None, metrics=metrics, num_samples=len(data))

    def guarded(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Evaluate, and report a failure instead of ending the training; a collective call.

        Whether a run evaluates changes no random number of the training.

        Returns:
            The figures; empty where it failed on any rank.
        """
        problem, metrics = None, {}
        on_gpu = self.trainer.args.device.type == "cuda"
        try:
            # else dropout after an evaluation would differ, and a resumed run that skips one would not be equal
            with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
                metrics = evaluate()
        except EvaluationInterrupted:
            raise
        except Exception as error:
            # into log.txt: without --verbose, the console captures standard error
            traceback.print_exc()
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        # all ranks return figures or none does: they decide by them on the best checkpoint and on early stopping
        problem = next((text for text in self.context.signals.all_gather(problem) if text), None)
        if problem is None:
            return metrics
        text = f"the evaluation at step {self.trainer.state.global_step} failed ({problem}); log.txt has the traceback"
        self.context.say(coded("DSR371", f"warning   {text}"))
        return {}

    def no_such_figure(self, metrics: dict[str, float], resume: str) -> UserError:
        """The error for a --metric_for_best_model that the evaluation does not report; `resume` says how to resume."""
        name = str(self.trainer.args.metric_for_best_model)
        return UserError(
            "DSR373",
            f"--metric_for_best_model {name}: the evaluation has no such figure{nearest(name, metrics)}, but "
            f"{', '.join(metrics)}. {resume}",
        )

    def _check_stop(self) -> None:
        """End an evaluation during training when the run is to stop; a collective call (EvaluationInterrupted)."""
        if self.trainer.is_in_train:
            self.context.signals.sync()
            if self.context.signals.leaving:
                raise EvaluationInterrupted

    def loss_and_logits(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits of a collated batch, as in training but without dropout; a collective call."""
        trainer = self.trainer
        model: Any = trainer.model
        model.eval()
        inputs = trainer._prepare_inputs({name: value for name, value in batch.items() if name != TOKEN_COUNTS})
        one = torch.ones((), device=trainer.args.device)
        with torch.no_grad():
            loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=one)
        return loss, outputs.logits

    def _loss_and_perplexity(self, sums: torch.Tensor) -> dict[str, Any]:
        """Figures of [loss summed over labels, number of labels] of all ranks."""
        total, count = sums.tolist()
        loss = total / count if count else math.nan
        if not self.causal:
            return {"loss": loss}
        # exp(710) is more than a float holds
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)) if count else math.nan}

    def _evaluate_source(self, dataloader: DataLoader) -> tuple[torch.Tensor, Predictions | None]:
        """Evaluate one source: [loss summed over labels, number of labels] of all ranks, and predictions for metrics."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        model: Any = trainer.model
        model.eval()
        # as the divisor of each batch, it makes the loss a sum
        one = torch.ones((), device=trainer.args.device)
        # in fp64, so that the sum does not depend on how rows are divided into batches
        sums = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
        logits: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        self.watchdog.enter("evaluating")
        for batch in dataloader:
            self.watchdog.enter("evaluating")
            self._check_stop()
            batch.pop(TOKEN_COUNTS)
            batch = trainer._prepare_inputs(batch)
            targets = batch["labels"]
            weight = batch[WEIGHTS].sum(dtype=torch.float64) if WEIGHTS in batch else labelled(targets).sum().double()
            with torch.no_grad():
                loss, outputs = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=one)
            # compute_loss multiplies by the number of ranks, over which DDP and DeepSpeed average gradients
            sums += torch.stack([loss.double() / accelerator.num_processes, weight])
            if trainer.compute_metrics is not None:
                # to the CPU at once: the logits of a whole split need not fit on the accelerator
                logits.append(accelerator.gather(outputs.logits.float()).cpu())
                labels.append(accelerator.gather(targets).cpu())
            trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        self.watchdog.enter("computing metrics")
        sums = accelerator.reduce(sums)
        if trainer.compute_metrics is None:
            return sums, None
        sampler: Any = dataloader.batch_sampler
        data: Any = dataloader.dataset
        # rows come sorted by length; padding rows have the index -1 and so are first here
        in_row_order = np.argsort(sampler.order().flatten(), kind="stable")[-len(data) :]
        return sums, (torch.cat(logits).numpy()[in_row_order], torch.cat(labels).numpy()[in_row_order])
