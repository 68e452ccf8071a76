"""How layers that a checkpoint lacks are initialized, and which missing weights are refused."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dsrecipes.errors import UserError, plural
from dsrecipes.zero.internals import full_shape


def refuse_missing_weights(missing: list[str], model: PreTrainedModel, name: str, trained_head: bool) -> None:
    """Refuse a checkpoint that lacks more than a new head; transformers would only warn and draw them at random.

    Args:
        missing: parameters that were not loaded.
        trained_head: whether the checkpoint must bring its head too.

    Raises:
        UserError: names the first one.
    """
    body = f"{model.base_model_prefix}."
    # A pooler belongs to the head: masked language models are saved without one.
    refused = [key for key in missing if trained_head or (key.startswith(body) and "pooler" not in key)]
    if refused:
        raise UserError(
            "DSR216",
            f"model {name}: {plural(len(refused), 'weight')} missing from its files or of another shape ({refused[0]}, ...); "
            "they are damaged or incomplete",
        )


def initialize_head(model: nn.Module, missing: list[str], config: PretrainedConfig, seed: int) -> None:
    """Initialize missing parameters from a generator of their own: the same numbers at every ZeRO stage.

    Matrices are normal with the model's initializer_range (0.02 where it has none), other weights 1, biases 0.
    """
    parameters = dict(model.named_parameters())
    # transformers' own initialization draws other numbers under ZeRO-3 than without it.
    generator = torch.Generator().manual_seed(seed)
    for name in missing:
        if name not in parameters:
            continue
        shape = full_shape(parameters[name])
        values = torch.zeros(shape)
        if len(shape) > 1:
            values.normal_(0.0, getattr(config, "initializer_range", 0.02), generator=generator)
        elif name.endswith("weight"):
            values.fill_(1.0)
        _assign(parameters[name], values)


def _assign(parameter: nn.Parameter, values: torch.Tensor) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        parameter.data.copy_(values)
        return
    import deepspeed

    # Rank 0 writes the gathered parameter, and leaving the block broadcasts it to the shards of all ranks.
    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(values)


def head_layers(model: PreTrainedModel, missing: list[str], auto_class: str) -> list[str]:
    """Layers that are trained in full beside an adapter: newly initialized ones, and a classifier's head."""
    names = {key.rpartition(".")[0] for key in missing}
    if auto_class.endswith("ForSequenceClassification"):
        layers = model.named_children()
        names |= {
            name for name, layer in layers if name != model.base_model_prefix and next(layer.parameters(), None) is not None
        }
    return sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))
