"""How the loss of a step is computed for labelled rows and for weighted tokens: a sum over labels, divided once."""

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
    """Loss summed over labelled rows, divided by the number of labelled rows of the whole step.

    Heads with one label per row (BertForMultipleChoice in transformers 5.23) take **kwargs but ignore num_items_in_batch:
    their own mean would be multiplied by accumulation x ranks, and is NaN for a batch of padding rows.

    Args:
        outputs: a model output with logits (rows, classes).
        labels: as PaddingCollator makes them, -100 or NaN where there is no label.
        num_items_in_batch: labelled rows of the step, or the sum of their weights, over micro batches and ranks.
        weights: (rows,), or None where all are 1.

    Returns:
        A scalar; the bare sum where num_items_in_batch is None.
    """
    # fp32: a sum of many losses drops digits in 16 bits.
    losses = losses_by_row(outputs.logits.float(), labels)
    loss = losses.sum() if weights is None else (losses * weights.to(losses.device)).sum()
    return loss / num_items_in_batch if num_items_in_batch is not None else loss


def losses_by_row(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each row, (rows,), 0 where there is no label.

    Cross-entropy for a class number, the mean binary cross-entropy over the classes for several labels, the squared error
    for a number, as transformers' ForSequenceClassificationLoss computes them.

    Args:
        logits: (rows, classes); (rows, 1) for a number.
        labels: (rows,) integers, or floats of shape (rows, classes) or (rows,).
    """
    if not labels.is_floating_point():
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    has_label = labelled(labels)
    if labels.ndim == 2:
        # NaN marks rows without labels, and NaN times 0 is NaN.
        targets = labels.masked_fill(~has_label[:, None], 0)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    else:
        losses = (logits[:, 0] - labels.masked_fill(~has_label, 0)).square()
    return losses * has_label


def weighted_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, total: torch.Tensor | int | None
) -> torch.Tensor:
    """Weighted cross-entropy, summed over labels and divided by `total`.

    torch's CrossEntropyLoss(weight=...) divides by the same sum. Labels that are IGNORE add nothing.

    Args:
        logits: (..., classes), one row per label.
        labels: of any shape.
        weights: of the shape of labels.
        total: sum of the weights of the whole step, over micro batches and ranks; None: the bare sum.
    """
    logits = logits.float().view(-1, logits.shape[-1])
    losses = nn.functional.cross_entropy(logits, labels.view(-1).to(logits.device), ignore_index=IGNORE, reduction="none")
    loss = (losses * weights.view(-1).to(logits.device)).sum()
    return loss / total if total is not None else loss
