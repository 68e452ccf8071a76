"""Which errors mean that memory ran out."""

from __future__ import annotations

import torch

_PHRASES = ("can't allocate memory", "out of memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's memory, or this process's, ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # cuBLAS, torch's CPU allocator and the operating system raise plain errors for it.
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(phrase in text for phrase in _PHRASES)
