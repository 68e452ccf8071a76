"""Which class of transformers a recipe's model has, and what its forward pass accepts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from dsrecipes.zero.internals import full_numel

_CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_MULTIMODAL = "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"


def class_names(table: str) -> set[str]:
    """Names of the model classes in one of transformers' tables."""
    names: set[str] = set()
    for value in getattr(modeling_auto, table).values():
        # Some families have several classes for one task.
        names |= {value} if isinstance(value, str) else set(value)
    return names


def unwrapped(model: nn.Module) -> Any:
    """The model of transformers inside a LoRA model, or the model itself."""
    # By method instead of type, so that peft need not be imported.
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else model


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model, or the base of a LoRA model, is one of transformers' causal language models."""
    kind = type(unwrapped(model))
    return kind.__name__ in class_names(_CAUSAL) or _is_text_generator(kind)


def _is_text_generator(kind: Any) -> bool:
    """Whether a class that also takes images or sound computes selected logits from text alone."""
    is_multimodal = kind is not None and kind.__name__ in class_names(_MULTIMODAL)
    return is_multimodal and "logits_to_keep" in inspect.signature(kind.forward).parameters


def averages_own_loss(model: nn.Module) -> bool:
    """Whether the model's own loss may be a mean over its micro batch, instead of a sum over the labels of the step."""
    base = unwrapped(model)
    return type(base).__name__ not in class_names(_CAUSAL) or not getattr(base, "accepts_loss_kwargs", True)


def accepts_text(config: PretrainedConfig) -> bool:
    """Whether the checkpoint's own class also takes images or sound, and can be trained on rows of text."""
    return any(_is_text_generator(getattr(transformers, name, None)) for name in config.architectures or [])


def loading_class(auto_class: str, config: PretrainedConfig) -> Any:
    """The class of transformers that loads a model for a recipe's auto class.

    A model that also takes images or sound is loaded in full by a causal recipe, so that it is saved in full.
    """
    architectures = set(config.architectures or [])
    # AutoModelForCausalLM would load the text part alone, and saving would lose the rest.
    if auto_class == "AutoModelForCausalLM" and not architectures & class_names(_CAUSAL) and accepts_text(config):
        return transformers.AutoModelForMultimodalLM
    return getattr(transformers, auto_class)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding; it may equal eos, because labels are masked by length and never by id."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of frozen parameters, full ones also where ZeRO-3 or 4 bits store fewer elements."""
    trained = frozen = 0
    for parameter in model.parameters():
        count = full_numel(parameter)
        # bitsandbytes packs two 4-bit values into an element.
        if hasattr(parameter, "quant_state"):
            shape = getattr(parameter.quant_state, "shape", None)
            count = int(torch.Size(shape).numel()) if shape is not None else count * 2
        if parameter.requires_grad:
            trained += count
        else:
            frozen += count
    return trained, frozen
