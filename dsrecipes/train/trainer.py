"""transformers.Trainer with the hooks it lacks: step layout, exact evaluation, what is logged."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from dsrecipes.data.collate import TOKEN_COUNTS, labelled
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.sampler import StepLoader, StepSampler, StreamSampler
from dsrecipes.data.sequences import PADDING_ROW, Sequences
from dsrecipes.data.stream import Stream
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import UserError
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.model.loss import row_loss, weighted_loss
from dsrecipes.model.router import router_loss_of, trained_tokens
from dsrecipes.model.task import averages_own_loss, is_causal_lm, unwrapped
from dsrecipes.train.resuming import EvaluationInterrupted, ResumableTrainer


class RecipeTrainer(ResumableTrainer):
    """Trainer over Sequences; rows of a step depend on seed and step alone, evaluation loss is a sum over labels.

    Where rows have weights, the sum of the weights of a step's labels, over micro batches and ranks, divides the loss in
    place of their number, so that a row of weight 2 has the gradient of the row given twice.
    """

    def __init__(self, *, watch: Watchdog, weighted: bool = False, **kwargs: Any) -> None:
        causal = is_causal_lm(kwargs["model"])
        if not causal:
            kwargs["model"].accepts_loss_kwargs = False
        if causal:
            kwargs["compute_metrics"] = None
        self.router = router_loss_of(kwargs["model"]) if causal else None
        loss_function = None if causal else self._row_loss
        if causal and (self.router is not None or weighted or averages_own_loss(kwargs["model"])):
            loss_function = self._own_loss
        super().__init__(compute_loss_func=loss_function, **kwargs)
        self.watch = watch
        self.add_callback(_Watched(watch))
        self.causal = causal
        self.details: dict[str, dict] = {}
        self._tally = [0, 0]
        self._inputs: dict[str, torch.Tensor] = {}
        """The micro batch whose loss is computed."""
        self._sequences_of_step = 1.0
        """Sequences of this step that are trained on, over micro batches and ranks."""
        self.step_weight: float | None = None
        """Sum of the weights of this step's labels, over micro batches and ranks; None where rows have none."""
        self._router_losses: list[torch.Tensor] = []
        self._logged_steps = 0
        """Router losses since the last log line, and the steps that they come from."""
        self._rate = 0.0
        self._clock = _Clock()
        self.batches: list[dict[str, torch.Tensor]] = []
        """The micro batches of this step, their losses, and the gradient norm where the engine gives one."""
        self.losses: list[torch.Tensor] = []
        self.gradient_norm: torch.Tensor | float | None = None

    # ---- rows of a step ----

    def _loader(self, data: Sequences | Stream, micro: int, *, accumulation: int, shuffle: bool) -> DataLoader:
        args = self.args
        if data.sample.weighted:  # not all windows of a stream need have weights: each step looks at its own
            self._check_weights(data, self.data_collator([data.sample[PADDING_ROW]]))
        if isinstance(data, Stream):
            sampler = StreamSampler(args.max_steps, (accumulation, args.world_size, micro), args.process_index)
            # a worker process would read and tokenize everything once more; the stream's thread reads ahead
            return StepLoader(
                data, batch_sampler=sampler, collate_fn=self.data_collator,
                pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            )  # fmt: skip
        sampler = StepSampler(
            data.lengths, micro, accumulation=accumulation, rank=args.process_index, world=args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed, shuffle=shuffle, data=data,
        )  # fmt: skip
        return StepLoader(
            data, batch_sampler=sampler, collate_fn=self.data_collator, num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers, prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )  # fmt: skip

    def _check_weights(self, data: Sequences | Stream, batch: dict[str, torch.Tensor]) -> None:
        """Refuse a collator of a recipe's own that leaves the weights of the rows out (UserError)."""
        if data.sample.weighted and WEIGHTS not in batch:
            raise UserError(
                "the rows have weights, which the recipe's collator leaves out: have it return `weights`, of the shape of "
                "its labels (see dsrecipes.data.collate)"
            )

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro batches, in step order."""
        return self._loader(
            self.train_dataset, self.args.train_batch_size, accumulation=self.args.gradient_accumulation_steps,
            shuffle=self.args.train_sampling_strategy == "random",
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: Sequences | None = None) -> DataLoader:
        """This rank's part of the evaluation rows; every rank has as many batches."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        return self._loader(data, self.args.eval_batch_size, accumulation=1, shuffle=False)

    def get_batch_samples(self, *args: Any) -> tuple[list, torch.Tensor | int | None]:
        """A step's micro batches, with their counts of useful tokens and rows taken out."""
        self.watch.enter("reading rows", self.state.global_step + 1)
        self._clock.start()
        self._rate = float(self.optimizer.param_groups[0]["lr"])
        batches, items = super().get_batch_samples(*args)
        if batches and isinstance(self.train_dataset, Stream):
            self._check_weights(self.train_dataset, batches[0])
        for batch in batches:
            self._tally = [total + more for total, more in zip(self._tally, batch.pop(TOKEN_COUNTS).tolist(), strict=True)]
        self.batches, self.losses, self.gradient_norm = batches, [], None
        if self.router is not None:
            sequences = sum(int(trained_tokens(batch).any(1).sum()) for batch in batches)
            self._sequences_of_step = self._over_ranks([float(sequences)], torch.distributed.ReduceOp.SUM)[0]
            self._logged_steps += 1
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """What divides the loss of a step: its labels, or the sum of their weights."""
        self.step_weight = None  # of a stream, not all windows have weights
        if batch_samples and WEIGHTS in batch_samples[0]:
            total = sum(float(batch[WEIGHTS].sum(dtype=torch.float64)) for batch in batch_samples)
            self.step_weight = self._over_ranks([total], torch.distributed.ReduceOp.SUM)[0]
            # where all weigh 0, loss and gradient are 0 as well
            return torch.tensor(self.step_weight or 1.0, device=device)
        if not self.causal:  # transformers compares labels with -100, also where they are numbers
            batch_samples = [{"labels": torch.where(labelled(batch["labels"]), 0, IGNORE)} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device; numbers to learn stay in fp32, which Trainer would round to the engine's dtype."""
        numbers = {
            name: value.to(self.args.device)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        return {**super()._prepare_inputs(inputs), **numbers}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a micro batch, whose loss is kept until the step ends."""
        self.watch.enter("forward")
        self.losses.append(super().training_step(*args, **kwargs))
        return self.losses[-1]

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """The loss; where the model trains, the backward pass comes next."""
        self._inputs = dict(inputs)
        inputs.pop(WEIGHTS, None)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.watch.enter("backward")
        return loss

    def _own_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The token loss, and in training a mixture of experts' router loss.

        transformers adds the router loss whole to every micro batch and to the evaluation loss, and some of its
        classes for images and text average over the micro batch.
        """
        base = unwrapped(self.model)
        weights, shift_labels = self._inputs.get(WEIGHTS), self._inputs.get("shift_labels")
        if weights is None:
            loss = base.loss_function(
                logits=outputs.logits, labels=labels, vocab_size=base.config.get_text_config().vocab_size,
                num_items_in_batch=num_items_in_batch, shift_labels=shift_labels,
            )  # fmt: skip
        elif shift_labels is None:  # a collator of the recipe's own
            loss = weighted_loss(
                outputs.logits[:, :-1].contiguous(),
                labels[:, 1:].contiguous(),
                weights[:, 1:].contiguous(),
                num_items_in_batch,
            )
        else:
            loss = weighted_loss(outputs.logits, shift_labels, weights, num_items_in_batch)
        if self.router is None or not self.model.training or not self._sequences_of_step:
            return loss
        router_loss = self.router.of_micro_batch(outputs, trained_tokens(self._inputs)) / self._sequences_of_step
        self._router_losses.append(router_loss.detach())
        return loss + router_loss.to(loss.device)

    def _row_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        return row_loss(outputs, labels, num_items_in_batch, self._inputs.get(WEIGHTS))

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor | float | None:
        self.gradient_norm = super()._get_grad_norm(*args, **kwargs)
        return self.gradient_norm

    def sequences_of_step(self, step: int) -> list[list[int]]:
        """This rank's sequences of a step (from 1), by micro batch; of the epoch that the loader stands in."""
        sampler, accumulation = self.callback_handler.train_dataloader.batch_sampler, self.args.gradient_accumulation_steps
        first = (step - 1) * accumulation % len(sampler)
        return list(islice(sampler, first, first + accumulation))

    def loss_and_logits(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a collated batch, as in training but without dropout; all ranks must call it together."""
        self.model.eval()
        inputs = self._prepare_inputs({name: each for name, each in batch.items() if name != TOKEN_COUNTS})
        one = torch.ones((), device=self.args.device)
        with torch.no_grad():
            loss, outputs = self.compute_loss(self.model, inputs, return_outputs=True, num_items_in_batch=one)
        return loss, outputs.logits

    # ---- evaluation ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss summed over labels of all ranks, then divided: the same for any batch size and number of ranks.

        Where rows have weights, the loss is their weighted mean. Trainer's own loop averages batch means and repeats rows
        to fill the last batch.
        """
        parts = dataloader.dataset.parts
        if len(parts) == 1:
            found = {name: self._evaluate_source(dataloader) for name in parts}
        else:
            found = {name: self._evaluate_source(self.get_eval_dataloader(part)) for name, part in parts.items()}
        self.watch.enter("computing metrics")
        metrics = self._loss_and_perplexity(sum(sums for sums, _ in found.values()))
        if self.compute_metrics is not None:
            logits, labels = (np.concatenate(each) for each in zip(*(rows for _, rows in found.values()), strict=True))
            metrics |= self.compute_metrics(EvalPrediction(logits, labels))
        for name, (sums, _) in found.items():
            if name:
                metrics |= {f"{name}_{key}": value for key, value in self._loss_and_perplexity(sums).items()}
        self.details = {key: metrics.pop(key) for key in list(metrics) if isinstance(metrics[key], dict)}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    def _loss_and_perplexity(self, sums: torch.Tensor) -> dict[str, float]:
        """Of [loss summed over labels, labels], on all ranks."""
        total, count = sums.tolist()
        loss = total / count if count else math.nan
        perplexity = {"perplexity": math.exp(min(loss, 700)) if count else math.nan} if self.causal else {}
        return {"loss": loss} | perplexity

    def _evaluate_source(self, dataloader: DataLoader) -> tuple[torch.Tensor, tuple[np.ndarray, np.ndarray] | None]:
        """[Loss summed over labels, labels] of all ranks; logits and labels in row order where metrics need them."""
        model, device = self.model, self.args.device
        model.eval()
        one = torch.ones((), device=device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        logits: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        self.watch.enter("evaluating")
        for batch in dataloader:
            self.watch.enter("evaluating")
            self._leave_evaluation()
            batch.pop(TOKEN_COUNTS)
            batch = self._prepare_inputs(batch)
            targets = batch["labels"]
            weight = batch[WEIGHTS].sum(dtype=torch.float64) if WEIGHTS in batch else labelled(targets).sum().double()
            with torch.no_grad():
                loss, outputs = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=one)
            sums += torch.stack([loss.double() / self.accelerator.num_processes, weight])
            if self.compute_metrics is not None:
                logits.append(self.accelerator.gather(outputs.logits.float()).cpu())
                labels.append(self.accelerator.gather(targets).cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.watch.enter("computing metrics")
        sums = self.accelerator.reduce(sums)
        if self.compute_metrics is None:
            return sums, None
        order = dataloader.batch_sampler.order().flatten()
        place = np.argsort(order, kind="stable")[-len(dataloader.dataset) :]  # fillers, -1, come first
        return sums, (torch.cat(logits).numpy()[place], torch.cat(labels).numpy()[place])

    def _leave_evaluation(self) -> None:
        if self.is_in_train:
            self.keeping.orders.sync()
            if self.keeping.orders.leaving:
                raise EvaluationInterrupted

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the time it takes is not counted as training."""
        with self._clock.paused():
            return super().evaluate(*args, **kwargs)

    # ---- what is logged ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed (useful tokens and rows of all ranks, over training time alone) and the greatest peak memory."""
        logs.pop("total_flos", None)
        if "loss" in logs:
            seconds = self._clock.lap()
            tokens, rows = self._over_ranks([float(n) for n in self._tally], torch.distributed.ReduceOp.SUM)
            logs |= {"samples_per_second": rows / seconds, "tokens_per_second": tokens / seconds}
            logs["peak_memory_gb"] = self._over_ranks([peak_memory_gb(self.args.device)], torch.distributed.ReduceOp.MAX)[0]
            self._tally = [0, 0]
            if self._router_losses:
                total = self._over_ranks([float(torch.stack(self._router_losses).sum())], torch.distributed.ReduceOp.SUM)[0]
                logs["router_loss"] = total / self._logged_steps
                self._router_losses, self._logged_steps = [], 0
            # the rate of the step itself: with an optimizer block in the ZeRO JSON, Trainer reads the next step's
            logs["learning_rate"] = self._rate
        super().log(logs, start_time)

    def _over_ranks(self, values: list[float], how: Any) -> list[float]:
        if self.args.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        torch.distributed.all_reduce(tensor, how)
        return tensor.tolist()

    def last_loss(self) -> float | None:
        """The last logged training loss."""
        return next((line["loss"] for line in reversed(self.state.log_history) if "loss" in line), None)

    def _load_best_model(self) -> None:
        """Load it as a part of finishing: it takes as long as it takes."""
        self.watch.enter("finishing")
        super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save; the time it takes is not counted as training."""
        self.watch.enter("saving")
        with self._clock.paused():
            super()._save_checkpoint(model, trial)
        self.watch.enter("between steps")


class _Watched(TrainerCallback):
    """Tells the watch of the optimizer's step; DeepSpeed takes it at the end of the backward pass."""

    def __init__(self, watch: Watchdog) -> None:
        self.watch = watch

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.watch.enter("optimizer step")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.watch.enter("between steps")


class _Clock:
    """Seconds of training between two log lines, evaluation and saving left out."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.away = 0.0

    def start(self) -> None:
        if self.began is None:
            self.began = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.began is not None:
            self.away += time.perf_counter() - began

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = max(now - (self.began or now) - self.away, 1e-9)
        self.began, self.away = None, 0.0
        return seconds


def peak_memory_gb(device: torch.device) -> float:
    """Greatest memory so far in GB (1e9 bytes): allocated on the accelerator, or resident on a CPU run."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated(device) / 1e9  # torch.accelerator's came with 2.9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
