"""Forward passes of a causal model for measuring: logits at chosen places, batches of near lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from dsrecipes.model.task import is_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Wanted = tuple[list[int], list[int]]
"""Token ids, and the places among them, ascending, whose next-token logits are wanted."""


def logits_at(model: PreTrainedModel, wanted: list[Wanted], pad: int, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, fp32 logits (places, vocabulary)) of each sequence, the longest first.

    Padding stands behind the text, where no place looks, so there is no attention mask. Logits are computed at the wanted
    places alone.
    """
    order = sorted(range(len(wanted)), key=lambda index: -len(wanted[index][0]))
    selects = is_causal_lm(model)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = len(wanted[chosen[0]][0])
        ids = torch.full((len(chosen), width), pad)
        keep = torch.zeros((len(chosen), width), dtype=torch.bool)
        for line, index in enumerate(chosen):
            tokens, places = wanted[index]
            ids[line, : len(tokens)] = torch.tensor(tokens)
            keep[line, places] = True
        selection = {"logits_to_keep": keep.to(model.device)} if selects else {}
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), use_cache=False, **selection).logits
        logits = logits if selects else logits[keep.to(logits.device)]
        for index, own in zip(chosen, logits.split([len(wanted[i][1]) for i in chosen]), strict=True):
            yield index, own.float()
