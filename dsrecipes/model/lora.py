"""LoRA and 4-bit loading through peft and bitsandbytes."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from dsrecipes.adapter import lora_targets
from dsrecipes.config import ModelConfig
from dsrecipes.errors import UserError, nearest
from dsrecipes.model.modalities import unreached_by_text
from dsrecipes.model.task import is_causal_lm, loading_class


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
        target_modules=lora_targets(options.lora_target_modules),
        modules_to_save=heads or None,
        exclude_modules=_whole_modules([*heads, *unreached_by_text(model)]),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        raise UserError(f"--lora_target_modules {options.lora_target_modules}: {str(error).splitlines()[0]}") from None


def load_lora(model: PreTrainedModel, options: ModelConfig, folder: Path, keep_dtype: bool) -> PreTrainedModel:
    """Load a trained adapter onto its base, to be trained further; `keep_dtype` as for add_lora.

    Raises:
        UserError: the adapter does not fit the base, or its files are damaged.
    """
    from peft import LoraConfig, PeftModel

    from dsrecipes.model.hub import damaged, first_line

    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.lora_dropout, config.inference_mode = options.lora_dropout, False
        return PeftModel.from_pretrained(
            model, str(folder), config=config, is_trainable=True, autocast_adapter_dtype=not keep_dtype
        )
    except (*damaged(), RuntimeError) as error:
        raise UserError(f"the adapter {folder} does not fit its base model: {first_line(error)}") from error


def _whole_modules(names: list[str]) -> str | None:
    """A pattern, as peft takes it, for these modules and everything below them."""
    return rf"(?:{'|'.join(map(re.escape, names))})(?:\..*)?" if names else None


def check_targets(options: ModelConfig, config: PretrainedConfig, auto_class: str) -> None:
    """Refuse names and patterns of --lora_target_modules that match no layer, before weights are loaded.

    The model is built on the meta device; under ZeRO-3 this must come before TrainConfig, which would have it sharded.

    Raises:
        UserError: names the value and the layers that can be given.
    """
    targets = lora_targets(options.lora_target_modules)
    if not options.lora_r or targets == "all-linear":
        return
    with torch.device("meta"):
        model = loading_class(auto_class, config).from_config(copy.deepcopy(config))
    excluded = _whole_modules(unreached_by_text(model))
    layers = [name for name, module in model.named_modules() if _takes_lora(module)]
    if excluded:
        layers = [name for name in layers if not re.fullmatch(excluded, name)]
    last_names = sorted({name.rpartition(".")[2] for name in layers})
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            matched = any(re.fullmatch(target, name) for name in layers)
        else:
            matched = any(name == target or name.endswith(f".{target}") for name in layers)
        if not matched:
            raise UserError(
                f"--lora_target_modules {target}: no layer of {type(model).__name__} that can have an adapter matches"
                f"{nearest(target, last_names)}; there are {', '.join(last_names)}"
            )


def _takes_lora(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"
