"""How do sequences become the tensors of a batch?

Shifting, masking and selection of logits happen here and not in the model, so that any transformers model trains unpatched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dsrecipes.data.encode import IGNORE
from dsrecipes.data.sequences import Features
from dsrecipes.data.weights import WEIGHTS

TOKEN_COUNTS = "counts"
"""Key of a batch's [useful tokens, rows]; the trainer takes it out before the model gets the batch."""


class CausalCollator:
    """Collates sequences for a causal language model, with logits computed only where there is a label.

    There is no attention_mask: padding comes after the text, where no text position attends to it, and position ids that
    restart keep packed examples apart in every attention backend but flash attention, which reads them only in a batch of
    one. Shapes: input_ids, position_ids and logits_to_keep (batch, length), shift_labels, labels and, where rows have
    them, weights (number of labels,), counts (2,).
    """

    def __init__(self, pad_id: int, select_logits: bool, flash: bool = False) -> None:
        """Choose what a batch holds.

        Args:
            pad_id: fills the end of a shorter sequence.
            select_logits: False keeps all positions, for a model without logits_to_keep.
            flash: whether the batch holds the boundaries of examples for flash attention; other backends ignore them.
        """
        self.pad_id, self.select_logits, self.flash = pad_id, select_logits, flash

    def __call__(self, items: list[list[Features]]) -> dict[str, torch.Tensor]:
        width = max(sum(len(row["input_ids"]) for row in item) for item in items)
        ids = np.full((len(items), width), self.pad_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        targets = np.full_like(ids, IGNORE)
        weights = np.ones(ids.shape, dtype=np.float32) if WEIGHTS in items[0][0] else None
        tokens = rows = 0
        for line, item in enumerate(items):
            start = 0
            for row in item:
                end = start + len(row["input_ids"])
                ids[line, start:end] = row["input_ids"]
                positions[line, start:end] = np.arange(end - start)
                # shifted here, row by row, so that the last token of a row does not predict the first of the next row
                targets[line, start : end - 1] = row["labels"][1:]
                if weights is not None and len(row[WEIGHTS]):
                    weights[line, start : end - 1] = row[WEIGHTS][1:]
                # padding rows are not counted, so that tokens per second are useful tokens
                if (row["labels"] != IGNORE).any():
                    tokens, rows = tokens + end - start, rows + 1
                start = end
            # the positions of a single example continue into the padding, so that attention stays plainly causal; after
            # several examples, the padding counts as one more
            positions[line, start:] = np.arange(width - start) + (start if len(item) == 1 else 0)
        counts = torch.tensor([tokens, rows])
        return self._batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(targets), weights, counts)

    def _batch(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        weights: np.ndarray | None,
        counts: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Name the tensors, all of shape (batch, length); labels and weights are selected where there is a label."""
        keep = targets != IGNORE
        shift_labels = targets[keep] if self.select_logits else targets
        batch = {
            "input_ids": ids,
            "position_ids": positions,
            "labels": shift_labels,
            "shift_labels": shift_labels,
            TOKEN_COUNTS: counts,
        }
        if self.select_logits:
            batch["logits_to_keep"] = keep
        if weights is not None:
            values = torch.from_numpy(weights)
            batch[WEIGHTS] = values[keep] if self.select_logits else values * keep
        return batch | segments(positions) if self.flash else batch


def segments(position_ids: torch.Tensor) -> dict[str, Any]:
    """Compute the boundaries of the examples in a flattened micro batch, as flash attention takes them.

    The keys are those of transformers' FlashAttentionKwargs. Without them flash attention treats each row of a micro batch
    larger than one as a single example, whatever its positions.

    Args:
        position_ids: (batch, length); 0 begins an example.
    """
    # flattened, because varlen kernels see a micro batch as one line of tokens
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """Mark where there is something to learn; by row for numbers, where padding rows have NaN, as -100 may be a target."""
    if not labels.is_floating_point():
        return labels != IGNORE
    return ~labels.reshape(len(labels), -1).isnan().any(1)


class PaddingCollator:
    """Collates rows with one label each (classification, multiple choice), padded to the longest text.

    input_ids, attention_mask and other token fields: (batch, length) or (batch, choices, length). labels: (batch,) class
    numbers or, in float32, numbers; (batch, classes) of 0 and 1 in float32 for rows with several labels. weights, where
    rows have them: (batch,).
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: list[list[Features]]) -> dict[str, torch.Tensor]:
        rows = [row for item in items for row in item]
        nested = isinstance(rows[0]["input_ids"][0], (np.ndarray, list))
        width = max(len(text) for row in rows for text in _texts(row["input_ids"], nested))
        names = [name for name in rows[0] if name != "labels" and np.ndim(rows[0][name])]
        batch = {}
        for name in names:
            fill = self.pad_id if name == "input_ids" else 0
            batch[name] = _padded([row[name] for row in rows], nested, width, fill)
        ones = [[[1] * len(text) for text in _texts(row["input_ids"], nested)] for row in rows]
        batch["attention_mask"] = _padded(ones if nested else [texts[0] for texts in ones], nested, width, 0)
        # by type, not by the recipe: a float label is a target of regression or of several classes, an integer a class
        labels = np.array([row["labels"] for row in rows])
        is_number = np.issubdtype(labels.dtype, np.floating)
        batch["labels"] = torch.from_numpy(labels.astype(np.float32 if is_number else np.int64))
        real = labelled(batch["labels"])
        batch[TOKEN_COUNTS] = torch.stack([batch["attention_mask"][real].sum(), real.sum()])
        if WEIGHTS in rows[0]:
            batch[WEIGHTS] = torch.tensor([float(row[WEIGHTS]) for row in rows]) * real
        return batch


def _texts(values: Any, nested: bool) -> list[Any]:
    """Return the texts of a field as a list: several, or one."""
    return list(values) if nested else [values]


def _padded(fields: list[Any], nested: bool, width: int, fill: int) -> torch.Tensor:
    """Pad the texts of a field to `width`: (rows, width), or (rows, texts, width) where rows have several texts."""
    padded = [[[*text, *[fill] * (width - len(text))] for text in _texts(values, nested)] for values in fields]
    numbers = np.array(padded, dtype=np.int64)
    return torch.from_numpy(numbers if nested else numbers[:, 0].copy())
