"""How many bytes of weights, gradients and optimizer states a rank holds, and whether the ZeRO stage promises that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsrecipes.errors import UserError
from dsrecipes.zero.internals import full_numel, gradient_buffers, inner_optimizer, local_shard


def storage_bytes(tensors: Iterable[Any], exclude: dict[int, int]) -> dict[int, int]:
    """Bytes by address of the storages below some tensors, each storage once, without those in `exclude`."""
    sizes = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            # ZeRO's tensors are views of a few large buffers: counting storages by address counts each buffer once.
            if storage.nbytes() and storage.data_ptr() not in exclude:
                sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def iter_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from iter_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iter_tensors(item)


def gradient_tensors(module: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    """This rank's gradients between backward and update; views of one gradient may occur twice."""
    stepped = [parameter for group in inner_optimizer(optimizer).param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in (*module.parameters(), *stepped)]
    return [gradient for gradient in gradients if gradient is not None] + list(iter_tensors(gradient_buffers(optimizer)))


def held_bytes(module: nn.Module, optimizer: Any) -> dict[str, dict[int, int]]:
    """This rank's storages of parameters, gradients and optimizer states: bytes by address.

    Call it between backward and update, when gradients exist. Optimizer states are Adam's two moments and, where ZeRO
    keeps one, the copy of the parameters that it updates.

    Args:
        optimizer: DeepSpeed's (`engine.optimizer`), or torch's own.
    """
    adam = inner_optimizer(optimizer)
    parameters = list(module.parameters())
    own = storage_bytes([*(p.data for p in parameters), *map(local_shard, parameters)], {})
    gradients = storage_bytes(gradient_tensors(module, optimizer), own)
    masters = [parameter.data for group in adam.param_groups for parameter in group["params"]]
    states = storage_bytes([*masters, *iter_tensors(dict(adam.state))], own | gradients)
    return {"parameters": own, "gradients": gradients, "optimizer": states}


@dataclass(frozen=True)
class Shards:
    """Bytes that one rank holds after the first step, and what it would hold if nothing were sharded."""

    weights: int
    gradients: int
    states: int
    whole_weights: int
    whole_gradients: int
    whole_states: int

    def share(self, part: str) -> tuple[int, int]:
        """Bytes held and bytes of the whole, for weights, gradients or states."""
        held = getattr(self, part)
        # Padding can make the held bytes exceed the computed whole.
        return held, max(held, getattr(self, f"whole_{part}"))


def gradient_bytes(module: nn.Module, optimizer: Any) -> tuple[int, int]:
    """Bytes of this rank's gradients, and bytes of an element, between backward and update.

    Of a gradient that spans two shards only this rank's part counts, though ZeRO-2 keeps the memory of all of it.
    """
    tensors = {(tensor.data_ptr(), tensor.numel()): tensor for tensor in gradient_tensors(module, optimizer)}.values()
    element_size = max((tensor.element_size() for tensor in tensors), default=4)
    return sum(tensor.nbytes for tensor in tensors), element_size


def measure_shards(module: nn.Module, optimizer: Any, gradients: tuple[int, int]) -> Shards:
    """Count bytes after the first update; of weights this rank's shard, not what ZeRO-3 has gathered temporarily.

    Args:
        gradients: gradient_bytes before the update.
    """
    parameters = list(module.parameters())
    trained = sum(full_numel(parameter) for parameter in parameters if parameter.requires_grad)
    states = sum(held_bytes(module, optimizer)["optimizer"].values())
    updated = _updated_elements(optimizer)
    return Shards(
        weights=sum(storage_bytes(map(local_shard, parameters), {}).values()),
        gradients=gradients[0],
        states=states,
        whole_weights=sum(full_numel(parameter) * parameter.element_size() for parameter in parameters),
        whole_gradients=trained * gradients[1],
        # In proportion to the elements, because optimizers differ in what they hold of each.
        whole_states=states * trained // updated if updated else 0,
    )


def _updated_elements(optimizer: Any) -> int:
    """Elements of parameters that this rank updates."""
    adam = inner_optimizer(optimizer)
    sizes = [max((tensor.numel() for tensor in iter_tensors(dict(state))), default=0) for state in adam.state.values()]
    if any(sizes):
        return sum(sizes)
    # SGD without momentum: its only state is ZeRO's copy of the parameters.
    return sum(parameter.numel() for group in adam.param_groups for parameter in group["params"])


_TITLES = {"weights": "weights", "gradients": "gradients", "states": "optimizer states"}
_SHARDED_SINCE = {"states": 1, "gradients": 2, "weights": 3}
"""The first ZeRO stage that shards them."""


def check_shards(stage: int | None, ranks: list[Shards], offloaded: bool) -> str:
    """Compare what each rank holds with what the stage promises; returns a line for the console.

    Args:
        stage: the requested ZeRO stage, None for plain PyTorch.
        ranks: measurements of each rank.
        offloaded: whether the optimizer states are kept off the device.

    Raises:
        UserError: a rank holds more than its share.
    """
    for part, since in _SHARDED_SINCE.items():
        if (stage or 0) < since or len(ranks) < 2:
            continue
        for rank, shards in enumerate(ranks):
            held, whole = shards.share(part)
            # Halfway between a share and the whole: padding, and gradients that span two shards, weigh more in a small model.
            if held > (whole + whole / len(ranks)) / 2:
                raise UserError(
                    "DSR277",
                    f"ZeRO-{stage} shards the {_TITLES[part]} over {len(ranks)} ranks, but rank {rank} holds "
                    f"{_megabytes(held, whole)} of them: the engine does not do what it was asked for. --audit false skips "
                    "the check",
                )
    largest = [max(shards.share(part) for shards in ranks) for part in _TITLES]
    parts = [f"{title} {_megabytes(held, whole)}" for title, (held, whole) in zip(_TITLES.values(), largest, strict=True)]
    device = " off the device" if offloaded else ""
    each_rank = " on each rank" if len(ranks) > 1 else ""
    return " · ".join(parts) + device + each_rank


def _megabytes(held: int, whole: int) -> str:
    return f"{held / 1e6:,.4g} of {whole / 1e6:,.4g} MB" if held < whole else f"{held / 1e6:,.4g} MB"
