"""How alike are an answer and its reference: ROUGE-L and exact match."""

from __future__ import annotations

import re

from dsrecipes.data.questions import plain

_HAN_AND_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# rouge_score splits at underscores, which \w would take as letters.
_WORD = re.compile(f"[{_HAN_AND_KANA}]|[^\\W_{_HAN_AND_KANA}]+")


def words(text: str) -> list[str]:
    """Split into lower-case words and single Chinese characters and kana; English as the rouge_score package does.

    Chinese and Japanese put no blanks between words, so that a whole sentence would be one word.
    """
    return _WORD.findall(text.lower())


def _common_length(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, in O(len(second)) memory."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, 1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]


def rouge_l(prediction: str, reference: str) -> float:
    """F measure of the longest common subsequence of words (Lin 2004, section 3), 0 to 1."""
    first, second = words(prediction), words(reference)
    common = _common_length(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same text, letter case and spacing aside; else 0."""
    return float(plain(prediction) == plain(reference))
