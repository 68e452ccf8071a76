"""Recognize errors that mean memory ran out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's memory, or this process's, ran out."""
    words = ("can't allocate memory", "out of memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, OSError)) and any(each in str(error).lower() for each in words)
    )
