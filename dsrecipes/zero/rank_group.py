"""How ranks exchange numbers and Python objects without waiting for the accelerator."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch


class RankGroup:
    """A gloo group of all ranks, apart from the group that the gradients use.

    It works on CPU tensors, so that a collective call does not wait for the work queued on a GPU.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def greatest(self, values: list[float]) -> list[float]:
        """Maximum over ranks of each value; a collective call."""
        # float64 holds numbers of bytes exactly.
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value, on all ranks; a collective call."""
        values: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def close(self) -> None:
        """Release the group's connections."""
        torch.distributed.destroy_process_group(self._group)


def rank_group(timeout: timedelta | None) -> RankGroup | None:
    """A group of all ranks, or None where there is one rank; a collective call.

    Args:
        timeout: how long a rank waits for the others (--ddp_timeout).
    """
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return RankGroup(timeout) if several else None
