"""The class of transformers that a recipe's model has, and what its forward pass takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from dsrecipes.zero.internals import full_numel

CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_SENSES = "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"


def class_names(table: str) -> set[str]:
    """Names of the model classes in one of transformers' tables."""
    values = getattr(modeling_auto, table).values()
    return {name for value in values for name in ((value,) if isinstance(value, str) else value)}


def unwrapped(model: nn.Module) -> Any:
    """The model of transformers inside a LoRA model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model, or the base of a LoRA model, is one of transformers' causal language models."""
    kind = type(unwrapped(model))
    return kind.__name__ in class_names(CAUSAL) or _writes_text(kind)


def _writes_text(kind: Any) -> bool:
    """Whether a class that also takes images or sound computes selected logits from text alone."""
    known = kind is not None and kind.__name__ in class_names(_SENSES)
    return known and "logits_to_keep" in inspect.signature(kind.forward).parameters


def averages_own_loss(model: nn.Module) -> bool:
    """Whether the model's own loss may be a mean over its micro batch, whatever labels the step has."""
    base = unwrapped(model)
    return type(base).__name__ not in class_names(CAUSAL) or not getattr(base, "accepts_loss_kwargs", True)


def accepts_text(config: PretrainedConfig) -> bool:
    """Whether the checkpoint's own class also takes images or sound, and can be trained on rows of text."""
    return any(_writes_text(getattr(transformers, name, None)) for name in config.architectures or [])


def loading_class(auto_class: str, config: PretrainedConfig) -> Any:
    """The class of transformers that loads a model for a recipe's auto class.

    A model that also takes images or sound is loaded whole by a causal recipe, so that it is saved whole.
    """
    made_for = set(config.architectures or [])
    if auto_class == "AutoModelForCausalLM" and not made_for & class_names(CAUSAL) and accepts_text(config):
        return transformers.AutoModelForMultimodalLM
    return getattr(transformers, auto_class)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding. It may equal eos: labels are masked by length, never by id."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(each for each in candidates if each is not None)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, frozen) parameters, whole ones also where ZeRO-3 or 4 bits store less."""
    trained = frozen = 0
    for parameter in model.parameters():
        count = full_numel(parameter)
        if hasattr(parameter, "quant_state"):
            shape = getattr(parameter.quant_state, "shape", None)
            count = int(torch.Size(shape).numel()) if shape is not None else count * 2
        if parameter.requires_grad:
            trained += count
        else:
            frozen += count
    return trained, frozen
