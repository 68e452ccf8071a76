"""Which options change how a row is tokenized?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncodeOptions:
    """Everything that changes the tokens of a row, and therefore the key of the token cache."""

    max_length: int
    prompt_style: str
    problem_type: str = "auto"
    reasoning: str = "keep"
