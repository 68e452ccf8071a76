"""The options that change how a record is tokenized."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncodeOptions:
    """All that changes tokens, and so the cache key."""

    max_length: int
    prompt_style: str
    problem_type: str = "auto"
    reasoning: str = "keep"
