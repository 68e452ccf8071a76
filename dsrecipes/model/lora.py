"""LoRA and 4-bit loading through peft and bitsandbytes."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from dsrecipes.config import ModelConfig
from dsrecipes.errors import UserError
from dsrecipes.trainer import is_causal_lm


def four_bit(options: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit loading (QLoRA, arXiv:2305.14314) with one dtype for computation and storage."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def add_lora(model: PreTrainedModel, options: ModelConfig, heads: list[str], keep_dtype: bool) -> PreTrainedModel:
    """Freeze the model and add adapters to all linear layers (GPT-2's Conv1D too), or to the named ones.

    Args:
        heads: modules that start from random weights; they are trained whole and saved with the adapter.
        keep_dtype: leave the adapters in the model's dtype; False makes them fp32, which plain PyTorch updates.

    Raises:
        UserError: a named layer does not exist.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if is_causal_lm(model) else None,
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules or "all-linear",
        modules_to_save=heads or None,
        exclude_modules=heads or None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        raise UserError(f"--lora_target_modules {options.lora_target_modules}: {str(error).splitlines()[0]}") from None
