"""Bytes of weights, gradients and optimizer states that a rank holds, and whether they are what the ZeRO stage promises."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsrecipes.errors import UserError


def storage_bytes(tensors: Iterable[Any], but: dict[int, int]) -> dict[int, int]:
    """Bytes by address of what lies under some tensors, each once, without those in `but`."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in but:
                found[storage.data_ptr()] = storage.nbytes()
    return found


def iter_tensors(value: Any) -> Iterable[torch.Tensor]:
    """Tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from iter_tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from iter_tensors(each)


def gradient_tensors(module: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    """This rank's gradients between backward and the update; some may be there twice."""
    adam = getattr(optimizer, "optimizer", optimizer)
    found = [
        *(p.grad for p in module.parameters()),
        *iter_tensors(getattr(optimizer, "averaged_gradients", None)),
        *iter_tensors(getattr(optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", None)),
        *(p.grad for group in adam.param_groups for p in group["params"]),
    ]
    return [each for each in found if each is not None]


def held_bytes(module: nn.Module, optimizer: Any) -> dict[str, dict[int, int]]:
    """This rank's storages of parameters, gradients and optimizer states: bytes by address.

    Gradients are there between backward and the update. Optimizer states are Adam's two moments and, where ZeRO keeps
    one, the copy of the parameters that it updates.

    Args:
        optimizer: DeepSpeed's (`engine.optimizer`), or torch's own.
    """
    adam = getattr(optimizer, "optimizer", optimizer)
    params = list(module.parameters())
    own = storage_bytes([*(p.data for p in params), *(getattr(p, "ds_tensor", None) for p in params)], {})
    gradients = storage_bytes(gradient_tensors(module, optimizer), own)
    masters = [p.data for group in adam.param_groups for p in group["params"]]
    states = storage_bytes([*masters, *iter_tensors(dict(adam.state))], own | gradients)
    return {"parameters": own, "gradients": gradients, "optimizer": states}


@dataclass(frozen=True)
class Shards:
    """Bytes that one rank holds after the first step, and what it would hold if nothing were divided."""

    weights: int
    gradients: int
    states: int
    whole_weights: int
    whole_gradients: int
    whole_states: int

    def share(self, part: str) -> tuple[int, int]:
        """(held, whole) of weights, gradients or states."""
        mine = getattr(self, part)
        return mine, max(mine, getattr(self, f"whole_{part}"))


def gradient_bytes(module: nn.Module, optimizer: Any) -> tuple[int, int]:
    """(bytes of this rank's gradients, bytes of an element) between backward and the update.

    Of a gradient across two shards only this rank's part, though ZeRO-2 keeps the memory of all of it.
    """
    tensors = {(each.data_ptr(), each.numel()): each for each in gradient_tensors(module, optimizer)}.values()
    return sum(each.nbytes for each in tensors), max((each.element_size() for each in tensors), default=4)


def measure_shards(module: nn.Module, optimizer: Any, gradients: tuple[int, int]) -> Shards:
    """Count after the first update; of weights this rank's own, not what ZeRO-3 has gathered for a while.

    Args:
        gradients: gradient_bytes before the update.
    """
    params = list(module.parameters())
    sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in params]
    trained = sum(size for size, p in sizes if p.requires_grad)
    adam = getattr(optimizer, "optimizer", optimizer)
    updated = sum(max((each.numel() for each in iter_tensors(dict(state))), default=0) for state in adam.state.values())
    if not updated:  # SGD without momentum: its only state is ZeRO's copy of the parameters
        updated = sum(each.numel() for group in adam.param_groups for each in group["params"])
    states = sum(held_bytes(module, optimizer)["optimizer"].values())
    return Shards(
        weights=sum(storage_bytes([getattr(p, "ds_tensor", p.data) for p in params], {}).values()),
        gradients=gradients[0],
        states=states,
        whole_weights=sum(size * p.element_size() for size, p in sizes),
        whole_gradients=trained * gradients[1],
        whole_states=states * trained // updated if updated else 0,
    )


_WORDS = {"weights": "weights", "gradients": "gradients", "states": "optimizer states"}
_SINCE = {"states": 1, "gradients": 2, "weights": 3}
"""The first ZeRO stage that divides them."""


def check_shards(stage: int | None, found: list[Shards], offloaded: bool) -> str:
    """Compare what each rank holds with what the stage promises; a line for the console.

    Args:
        stage: the ZeRO stage that was asked for, None for plain PyTorch.
        found: of each rank.
        offloaded: whether the optimizer states are kept off the device.

    Raises:
        UserError: a rank holds more than its share.
    """
    for part, since in _SINCE.items():
        for rank, each in enumerate(found):
            mine, whole = each.share(part)
            # halfway to the whole: padding, and a gradient that lies across two shards, weigh more in a small model
            if (stage or 0) >= since and len(found) > 1 and mine > whole / 2 + whole / len(found) / 2:
                raise UserError(
                    f"ZeRO-{stage} divides the {_WORDS[part]} over {len(found)} ranks, but rank {rank} holds {_mb(mine, whole)} "
                    "of them: the engine does not do what it was asked for. --audit false leaves the check out"
                )
    most = [max(each.share(part) for each in found) for part in _WORDS]
    told = [f"{words} {_mb(*each)}" for words, each in zip(_WORDS.values(), most, strict=True)]
    where = (" off the device" if offloaded else "") + (" on each rank" if len(found) > 1 else "")
    return " · ".join(told) + where


def _mb(mine: int, whole: int) -> str:
    return f"{mine / 1e6:,.4g} of {whole / 1e6:,.4g} MB" if mine < whole else f"{mine / 1e6:,.4g} MB"
