"""How attention keeps packed examples apart: on a CPU each example by itself, so that no masked block is computed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from dsrecipes.data.audit import PackedSample, check_isolation, difference
from dsrecipes.model.task import unwrapped

PER_EXAMPLE = "dsrecipes_by_example"
"""Name of this attention in transformers' registry."""


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each run of position ids; transformers' own where there is a mask or a cache.

    Args:
        query: (batch, heads, length, head size); key and value may have fewer heads.
        position_ids: (batch or 1, length), 0 where an example begins; absent, each row is one example.

    Returns:
        (batch, length, heads, head size), and no attention weights.
    """
    batch, heads, length, _ = query.shape
    # Padding or a key-value cache: position ids alone do not say what may be attended to.
    if attention_mask is not None or key.shape[2] != length:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    positions = torch.arange(length) if position_ids is None else position_ids
    starts = (positions.expand(batch, length) == 0).flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], batch * length], strict=True)]
    # split() instead of slices: the backward pass of each slice would fill a tensor of the full size.
    queries, keys, values = (states.transpose(1, 2).flatten(0, 1).split(lengths) for states in (query, key, value))
    outputs = []
    # Each tensor is (length of the example, heads, head size).
    for tensors in zip(queries, keys, values, strict=True):
        q, k, v = (states.transpose(0, 1)[None] for states in tensors)
        output = scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != heads
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1).view(batch, length, heads, -1), None


def _mask(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """No mask, unless there is padding or a cache."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PER_EXAMPLE, _attention)
AttentionMaskInterface.register(PER_EXAMPLE, _mask)


def set_per_example_attention(model: PreTrainedModel, on: bool) -> bool:
    """Turn attention per example on, or off (transformers' sdpa); returns whether the model accepted it.

    Models of transformers accept it whose attention goes through its interface, without a sliding window.
    """
    base = unwrapped(model)
    config = base.config.get_text_config()
    before, after = ("sdpa", PER_EXAMPLE) if on else (PER_EXAMPLE, "sdpa")
    # transformers applies a sliding window through the mask, which is not built here.
    if config._attn_implementation != before or getattr(config, "sliding_window", None):
        return False
    base.set_attn_implementation(after)
    return config._attn_implementation == after


def accepts_segments(model: PreTrainedModel) -> bool:
    """Whether the model uses flash attention and accepts the boundaries of examples (data.collate.segments)."""
    base = unwrapped(model)
    parameters = inspect.signature(base.forward).parameters
    accepts_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return ("cu_seq_lens_q" in parameters or accepts_any) and is_flash_attention_requested(base.config.get_text_config())


def isolate_examples(model: PreTrainedModel, sample: PackedSample, device: torch.device, choose: bool) -> None:
    """Ensure that packed examples do not attend to each other, by the fastest attention that this model supports here.

    Args:
        sample: examples whose answers, packed and alone, are compared.
        choose: whether the attention may be changed; not where the user named one.

    Raises:
        UserError: they do, whatever the attention.
    """
    if choose and device.type == "cpu":
        alone = sample.answer(packed=False)  # by the model's own attention
        if set_per_example_attention(model, True):
            if not difference(sample, sample.answer(packed=True), alone):
                return
            set_per_example_attention(model, False)
    check_isolation(model, sample)
