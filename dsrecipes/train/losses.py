"""Which loss does a micro batch have, where the model's own is not the mean over the labels of a step?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from dsrecipes.data.collate import labelled
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.model.loss import row_loss, weighted_loss
from dsrecipes.model.router import router_loss_of, trained_tokens
from dsrecipes.model.task import averages_own_loss, unwrapped
from dsrecipes.train.speed import sum_over_ranks


class StepLoss:
    """The loss function of a run, and the router loss of a mixture of experts since the last log line."""

    def __init__(self, model: PreTrainedModel, causal: bool, weighted: bool) -> None:
        """Choose the function.

        Args:
            model: as the recipe loaded it.
            causal: whether it writes text.
            weighted: whether rows have weights.
        """
        self.model, self.causal = model, causal
        self.router = router_loss_of(model) if causal else None
        self.function: Callable | None = None
        """Trainer's compute_loss_func; None leaves the loss to the model."""
        # Trainer averages a classifier's loss over micro batches, which is wrong where they differ in rows
        if not causal:
            self.function = self._row_loss
        elif self.router is not None or weighted or averages_own_loss(model):
            self.function = self._token_loss
        self.inputs: dict[str, Any] = {}
        """The micro batch whose loss is computed."""
        self.weight: float | None = None
        """Sum of the weights of this step's labels, over micro batches and ranks; None where rows have none."""
        self._sequences = 1.0
        """Sequences of this step that are trained on, over micro batches and ranks."""
        self._router_losses: list[torch.Tensor] = []
        self._logged_steps = 0
        """Steps that the router losses come from."""

    def begin_step(self, batches: list[dict[str, torch.Tensor]], args: TrainingArguments) -> list[dict[str, torch.Tensor]]:
        """Begin a step with these micro batches; a collective call.

        Returns:
            The micro batches as Trainer can count their labels: it compares them with -100, also where they are numbers.
        """
        # reset, because a window of a stream may have no weights after one that has some
        self.weight = None
        if batches and WEIGHTS in batches[0]:
            total = sum(float(batch[WEIGHTS].sum(dtype=torch.float64)) for batch in batches)
            self.weight = sum_over_ranks([total], args)[0]
        if self.router is not None:
            sequences = sum(int(trained_tokens(batch).any(1).sum()) for batch in batches)
            self._sequences = sum_over_ranks([float(sequences)], args)[0]
            self._logged_steps += 1
        if self.causal:
            return batches
        return [{"labels": torch.where(labelled(batch["labels"]), 0, IGNORE)} for batch in batches]

    def total_weight(self, device: torch.device) -> torch.Tensor | None:
        """What divides the loss of a step whose rows have weights; None for the number of labels."""
        if self.weight is None:
            return None
        # where all weights are 0, loss and gradient are 0 as well
        return torch.tensor(self.weight or 1.0, device=device)

    def pop_router_loss(self, args: TrainingArguments) -> float | None:
        """Mean router loss of the steps since the last call, over all ranks; None without one. A collective call."""
        if not self._router_losses:
            return None
        total = sum_over_ranks([float(torch.stack(self._router_losses).sum())], args)[0]
        # each router loss is a share of its step already, so the sum is divided by steps, not by micro batches
        mean = total / self._logged_steps
        self._router_losses, self._logged_steps = [], 0
        return mean

    def _row_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        return row_loss(outputs, labels, num_items_in_batch, self.inputs.get(WEIGHTS))

    def _token_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The token loss, and in training a mixture of experts' router loss.

        transformers adds the whole router loss to every micro batch and to the evaluation loss, and some of its classes for
        images and text average over the micro batch.
        """
        loss = self._weighted_or_plain(outputs.logits, labels, num_items_in_batch)
        if self.router is None or not self.model.training or not self._sequences:
            return loss
        router_loss = self.router.of_micro_batch(outputs, trained_tokens(self.inputs)) / self._sequences
        self._router_losses.append(router_loss.detach())
        # with device_map, the last layer may be on another device than the router
        return loss + router_loss.to(loss.device)

    def _weighted_or_plain(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        weights, shift_labels = self.inputs.get(WEIGHTS), self.inputs.get("shift_labels")
        if weights is None:
            base = unwrapped(self.model)
            return base.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=base.config.get_text_config().vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        if shift_labels is not None:
            return weighted_loss(logits, shift_labels, weights, num_items_in_batch)
        # a collator of the recipe's own, which has not shifted the labels
        logits, labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        return weighted_loss(logits, labels, weights[:, 1:].contiguous(), num_items_in_batch)
