"""How weights are quantized to 4 bits (QLoRA), and kept in the layout that was trained."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from dsrecipes.config.schema import ModelConfig


def four_bit_config(options: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit loading (QLoRA, arXiv:2305.14314) with one dtype for computation and storage."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        # ZeRO-3 shards weights of one dtype only, and the default, uint8, is another one.
        bnb_4bit_quant_storage=dtype,
    )


def disable_cpu_packing(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that was trained, on every CPU.

    On a CPU with AVX-512 BF16, bitsandbytes (0.50.2, nn/modules.py, Linear4bit.forward) repacks a weight at its first
    forward pass in evaluation mode and computes it in bf16 from then on. ZeRO-3 cannot shard the repacked weight, a
    checkpoint cannot hold it, and the logits differ from those of training and of other CPUs.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (torch types every attribute as a tensor)
