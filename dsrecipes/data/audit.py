"""Checks before the first step that a batch means what it should."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from dsrecipes.errors import UserError


def second_example(model: PreTrainedModel, device: torch.device, packed: bool) -> torch.Tensor:
    """Logits (7, vocabulary) of a short random example, alone or packed behind another one.

    All ranks must call it together, for under ZeRO-3 each holds a part of the weights.
    """
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    examples = [torch.randint(vocabulary, (1, length), generator=draw).to(device) for length in (9, 7)]
    examples = examples if packed else examples[1:]
    places = [torch.arange(each.shape[1], device=device)[None] for each in examples]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.cat(examples, 1), position_ids=torch.cat(places, 1), use_cache=False).logits
    return logits[0, -7:]


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in standard deviations of what was expected; 0 where rounding explains it."""
    limit = 1e-4 if expected.dtype == torch.float32 else 0.1
    largest = ((logits - expected).abs().max() / expected.float().std().clamp(min=1e-9)).item()
    return 0.0 if largest <= limit else largest


def check_isolation(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse packing where an example's logits change with the one before it.

    Models with ALiBi, learned positions of their own, or a recurrent state look across examples whatever the position
    ids say.

    Raises:
        UserError: they change; names the flag that turns packing off.
    """
    difference = distance(second_example(model, device, packed=True), second_example(model, device, packed=False))
    if difference:
        raise UserError(
            f"packing leaks in a {type(model).__name__}: an example's logits change by {difference:.2g} standard deviations "
            "when another one stands before it. Give --packing false"
        )
