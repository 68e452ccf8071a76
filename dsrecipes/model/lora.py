"""How LoRA adapters are added to a model, or loaded to be trained further (which layers: lora_targets.py)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dsrecipes.config.adapter import lora_targets
from dsrecipes.config.schema import ModelConfig
from dsrecipes.errors import UserError
from dsrecipes.io.hub import damaged, first_line
from dsrecipes.model.lora_targets import misfit, module_pattern
from dsrecipes.model.modalities import unreached_by_text
from dsrecipes.model.task import is_causal_lm


def add_lora(model: PreTrainedModel, options: ModelConfig, heads: list[str], keep_dtype: bool) -> PreTrainedModel:
    """Freeze the model and add adapters to all linear layers (GPT-2's Conv1D too), or to the named ones.

    Args:
        heads: modules that start from random weights; they are trained in full and saved with the adapter.
        keep_dtype: leave the adapters in the model's dtype, where DeepSpeed keeps fp32 copies; False makes them fp32,
            since plain PyTorch updates the adapters themselves.

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
        exclude_modules=module_pattern([*heads, *unreached_by_text(model)]),
        # GPT-2's Conv1D stores its weight transposed.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        flag = f"--lora_target_modules {options.lora_target_modules}"
        raise UserError("DSR217", f"{flag}: {str(error).splitlines()[0]}") from None
    return _without_base_weights(adapted)


def load_lora(model: PreTrainedModel, options: ModelConfig, folder: Path, keep_dtype: bool) -> PreTrainedModel:
    """Load a trained adapter onto its base, to be trained further.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        keep_dtype: as for add_lora.

    Raises:
        UserError: the adapter does not fit the base, or its files are damaged.
    """
    from peft import LoraConfig, PeftModel

    try:
        config = LoraConfig.from_pretrained(str(folder))
        # A saved adapter is marked for inference, which would freeze it.
        config.lora_dropout, config.inference_mode = options.lora_dropout, False
        adapted = PeftModel.from_pretrained(
            model, str(folder), config=config, is_trainable=True, autocast_adapter_dtype=not keep_dtype
        )
    except damaged() + (RuntimeError,) as error:
        raise UserError("DSR218", f"{misfit(options, folder)}: {first_line(error)}") from error
    return _without_base_weights(adapted)


def _without_base_weights(model: Any) -> PreTrainedModel:
    """Have the adapter saved without weights of the base.

    Otherwise peft 0.18 adds the whole embedding or head, frozen as it is, wherever one of the two has an adapter.
    """
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model
