"""Which parts of a model text never reaches: vision and audio towers, their projectors, cross-attention to images."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from dsrecipes.model.task import unwrapped
from dsrecipes.zero.internals import full_numel

_MODALITY = re.compile(r"vision|visual|image|video|audio|speech|vq")
"""In the name of a part's configuration, or of a module."""
_MODALITY_OR_BRIDGE = re.compile(_MODALITY.pattern + r"|projector|connector|multi_modal|multimodal")


def has_other_modalities(config: PretrainedConfig) -> bool:
    """Whether a configuration has a part for images or sound."""
    parts = getattr(type(config), "sub_configs", {})
    # The text model is one part of several: the others are for images or sound.
    if config.get_text_config(decoder=True) is not config:
        return len(parts) > 1
    return any(_MODALITY.search(name) and getattr(config, name, None) is not None for name in parts)


def unreached_by_text(model: Any) -> list[str]:
    """Names of the modules and parameters that rows of text never reach, only the outermost; none for a text model.

    Args:
        model: a model of transformers, without an adapter around it.
    """
    if not has_other_modalities(model.config):
        return []
    decoder = model.get_decoder()
    # Some classes hold the towers and the layers of the decoder in one module, where only names tell them apart.
    is_mixed = decoder in (model, model.base_model)
    parts = [part for part in (decoder, model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    reached = {id(below) for part in parts for below in part.modules()}
    names: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in names):
            continue
        if id(module) in reached:
            last_name = name.rpartition(".")[2]
            unreached = bool(_MODALITY_OR_BRIDGE.search(last_name)) if is_mixed else _is_cross_attention(module)
        else:
            holds_text = any(id(below) in reached for below in module.modules())
            if holds_text:
                # A module around text layers is reached, but its own parameters, such as an image newline, are not.
                names += [f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters(recurse=False)]
            unreached = not holds_text and any(True for _ in module.parameters())
        if unreached:
            names.append(name)
    return names


def _is_cross_attention(module: nn.Module) -> bool:
    """Whether it is a decoder layer that attends only to images (Mllama), and is skipped where there are none."""
    name = type(module).__name__
    return "CrossAttention" in name and name.endswith("Layer")


def parameters_below(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
    """Parameters of the named parts."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if any(name == part or name.startswith(f"{part}.") for part in names)
    ]


def unreached_note(model: nn.Module) -> str | None:
    """A note on the parts that text never reaches; None where there are none, or they are trained."""
    base = unwrapped(model)
    names = unreached_by_text(base)
    parameters = parameters_below(base, names)
    if not parameters or any(parameter.requires_grad for parameter in parameters):
        return None
    count = sum(map(full_numel, parameters))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"rows of text never reach {', '.join(names[:3])}{more}: {count:,} parameters are frozen, without an adapter"
