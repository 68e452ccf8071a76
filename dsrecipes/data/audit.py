"""Checks before the first step that a batch means what it should."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from dsrecipes.errors import UserError


def check_isolation(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse packing where an example's logits change with the one before it (UserError).

    All ranks must call it together, for under ZeRO-3 each holds a part of the weights.
    """
    difference, limit = leak(model, device)
    if not difference <= limit:
        raise UserError(
            f"packing leaks in a {type(model).__name__}: an example's logits change by {difference:.2g} standard deviations "
            "when another one stands before it. Give --packing false"
        )


def leak(model: PreTrainedModel, device: torch.device) -> tuple[float, float]:
    """Put two short examples into one sequence, and compare the second one's logits with those it has alone.

    Models with ALiBi, learned positions of their own, or a recurrent state look across examples whatever the position
    ids say.

    Returns:
        The largest difference in standard deviations of the logits, and the largest that rounding explains.
    """
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    first, second = (torch.randint(vocabulary, (1, length), generator=draw).to(device) for length in (9, 7))
    places = [torch.arange(each.shape[1], device=device)[None] for each in (first, second)]
    model.eval()
    with torch.no_grad():
        together = model(input_ids=torch.cat([first, second], 1), position_ids=torch.cat(places, 1), use_cache=False).logits[
            0, 9:
        ]
        alone = model(input_ids=second, position_ids=places[1], use_cache=False).logits[0]
    difference = ((together - alone).abs().max() / alone.float().std().clamp(min=1e-9)).item()
    return difference, 1e-4 if alone.dtype == torch.float32 else 0.1
