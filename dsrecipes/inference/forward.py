"""How are logits computed for measuring? Forward passes of a causal model, at chosen positions alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from dsrecipes.model.task import is_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ScoredSequence = tuple[list[int], list[int]]
"""Token ids, and the positions among them, ascending, whose next-token logits are needed."""


def logits_at(
    model: PreTrainedModel, sequences: list[ScoredSequence], pad: int, batch_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index, fp32 logits (positions, vocabulary)) of each sequence, the longest first.

    Padding is to the right, where a causal model does not look, so there is no attention mask. Logits are computed at the
    needed positions alone: with a large vocabulary they take more memory than the model.

    Args:
        model: in evaluation mode.
        sequences: ids and positions.
        pad: fills the shorter sequences of a batch.
        batch_size: sequences computed together; those of a batch have similar lengths.
    """
    # The longest first, so that too little memory shows in the first batch.
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index][0]))
    selects = is_causal_lm(model)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = len(sequences[chosen[0]][0])
        ids = torch.full((len(chosen), width), pad)
        needed = torch.zeros((len(chosen), width), dtype=torch.bool)
        for line, index in enumerate(chosen):
            tokens, positions = sequences[index]
            ids[line, : len(tokens)] = torch.tensor(tokens)
            needed[line, positions] = True
        selection = {"logits_to_keep": needed.to(model.device)} if selects else {}
        # No cache: nothing is generated, and its keys and values would take memory.
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), use_cache=False, **selection).logits
        if not selects:
            logits = logits[needed.to(logits.device)]
        counts = [len(sequences[index][1]) for index in chosen]
        for index, own in zip(chosen, logits.split(counts), strict=True):
            yield index, own.float()
