"""Losses of labelled rows and of weighted tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsrecipes.data.collate import labelled
from dsrecipes.data.encode import IGNORE


def row_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss summed over labelled rows, over the number of labelled rows of the whole step.

    Heads with one label a row (BertForMultipleChoice) take **kwargs but ignore num_items_in_batch: their own mean
    would be multiplied by accumulation x ranks, and is NaN for a batch of fillers.

    Args:
        outputs: a model output with logits (rows, classes).
        labels: as PaddingCollator makes them, -100 or NaN where there is nothing to learn.
        num_items_in_batch: labelled rows of the step, or the sum of their weights, over micro batches and ranks.
        weights: (rows,), or None where all are 1.
    """
    losses = losses_by_row(outputs.logits.float(), labels)
    loss = losses.sum() if weights is None else (losses * weights.to(losses.device)).sum()
    return loss / num_items_in_batch if num_items_in_batch is not None else loss


def losses_by_row(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each row, 0 where there is nothing to learn.

    Cross-entropy for a class number, the mean binary cross-entropy over the classes for several labels, the squared error
    for a number.

    Args:
        logits: (rows, classes); (rows, 1) for a number.
        labels: (rows,) integers, or floats of shape (rows, classes) or (rows,).
    """
    if not labels.is_floating_point():
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    real = labelled(labels)
    if labels.ndim == 2:
        targets = labels.masked_fill(~real[:, None], 0)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    else:
        losses = (logits[:, 0] - labels.masked_fill(~real, 0)).square()
    return losses * real


def weighted_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, total: torch.Tensor | int | None
) -> torch.Tensor:
    """Cross-entropy of each label times its weight, summed, over `total`, the sum of the weights of the whole step.

    torch's CrossEntropyLoss(weight=...) divides by the same sum. Labels that are IGNORE add nothing.

    Args:
        logits: (..., classes), one line a label.
        labels: of any shape.
        weights: of the shape of labels.
    """
    logits = logits.float().view(-1, logits.shape[-1])
    losses = nn.functional.cross_entropy(logits, labels.view(-1).to(logits.device), ignore_index=IGNORE, reduction="none")
    loss = (losses * weights.view(-1).to(logits.device)).sum()
    return loss / total if total is not None else loss
