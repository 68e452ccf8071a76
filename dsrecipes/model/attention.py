"""Attention of packed sequences on a CPU: each example by itself, so that no masked block is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dsrecipes.data.audit import check_isolation, leak

NAME = "dsrecipes_by_example"


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each run of position ids.

    Args:
        query: (batch, heads, length, head size); key and value may have fewer heads.
        position_ids: (batch, length), 0 where an example begins; absent, each row is one example.

    Returns:
        (batch, length, heads, head size), and no weights.
    """
    batch, heads, length, _ = query.shape
    positions = torch.arange(length).expand(batch, length) if position_ids is None else position_ids
    starts = (positions == 0).flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], batch * length], strict=True)]
    # split, not slices: the backward pass of each slice would fill a tensor of the whole size
    examples = [states.transpose(1, 2).flatten(0, 1).split(lengths) for states in (query, key, value)]
    outputs = [
        scaled_dot_product_attention(
            *(states.transpose(0, 1)[None] for states in example),
            dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != heads,
        ).transpose(1, 2)
        for example in zip(*examples, strict=True)
    ]  # fmt: skip
    return torch.cat(outputs, 1).view(batch, length, heads, -1), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def attend_by_example(model: PreTrainedModel, on: bool) -> bool:
    """Turn attention by example on or off (transformers' sdpa); False where the model does not take it.

    Models of transformers take it whose attention goes through its interface, without a sliding window.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config.get_text_config()
    before, after = ("sdpa", NAME) if on else (NAME, "sdpa")
    if text._attn_implementation != before or getattr(text, "sliding_window", None):
        return False
    base.set_attn_implementation(after)
    return text._attn_implementation == after


def keep_apart(model: PreTrainedModel, device: torch.device, choose: bool) -> None:
    """See that packed examples do not look at each other, by the fastest attention that this model takes here.

    Args:
        choose: whether the attention may be changed; not where the user named one.

    Raises:
        UserError: they do, whatever the attention.
    """
    if choose and device.type == "cpu" and attend_by_example(model, True):
        difference, limit = leak(model, device)
        if difference <= limit:
            return
        attend_by_example(model, False)
    check_isolation(model, device)
