"""Flash attention as transformers calls it, computed by torch's attention, since its kernels do not run on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import transformers.integrations.flash_attention as integration
import transformers.modeling_flash_attention_utils as modeling
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

Tensor = torch.Tensor


def _plain(query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float | None, **kwargs: Any) -> Tensor:
    """What flash_attn_func computes of (batch, length, heads, head size): each row is one example."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    out = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=softmax_scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float | None,
) -> Tensor:
    """What flash_attn_varlen_func computes of (tokens, heads, head size): attention inside each segment."""
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[-1] == len(query) and cu_seqlens_q.equal(cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    parts = zip(*(states.split(lengths) for states in (query, key, value)), strict=True)
    return torch.cat([_plain(*(states[None] for states in part), causal, softmax_scale)[0] for part in parts])


@contextlib.contextmanager
def flash_attention() -> Iterator[Callable[[PreTrainedModel], PreTrainedModel]]:
    """Yield a function that switches a loaded model to flash attention."""
    functions = (_plain, _varlen, None, modeling._pad_input, modeling._unpad_input)
    processed = modeling._lazy_define_process_function(_varlen)

    def switch_on(model: PreTrainedModel) -> PreTrainedModel:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.config._attn_implementation = "flash_attention_2"  # set_attn_implementation asks for the package
        return model

    with (
        patch.object(modeling, "lazy_import_flash_attention", lambda *_, **__: (functions, (processed, None))),
        patch.object(integration, "get_target_dtype", lambda *_: None),  # the kernels have no fp32, which is exact here
    ):
        yield switch_on
