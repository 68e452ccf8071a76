"""Figures of answers, as metrics of the evaluate library that need no download."""

from __future__ import annotations

import re
from typing import Any

import datasets
import evaluate
import numpy as np

from dsrecipes.data.questions import plain

_HAN_AND_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(f"[{_HAN_AND_KANA}]|[^\\W_{_HAN_AND_KANA}]+")
_BINS = 10


def words(text: str) -> list[str]:
    """Words in lower case, and each Chinese character or kana alone; for English what the rouge_score package splits."""
    return _WORD.findall(text.lower())


def _common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def rouge_l(prediction: str, reference: str) -> float:
    """F measure of the longest common subsequence of words (Lin 2004, section 3), 0 to 1."""
    first, second = words(prediction), words(reference)
    common = _common(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same text, letter case and spacing aside."""
    return float(plain(prediction) == plain(reference))


class _TextMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return _described(self, predictions=text, references=text)


class RougeL(_TextMetric):
    """Mean ROUGE-L F measure; Chinese counts by characters."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"rouge_l": float(np.mean([rouge_l(p, r) for p, r in zip(predictions, references, strict=True)]))}


class ExactMatch(_TextMetric):
    """Share of answers that are the reference, letter case and spacing aside."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"exact_match": float(np.mean([exact_match(p, r) for p, r in zip(predictions, references, strict=True)]))}


class Calibration(evaluate.Metric):
    """Expected calibration error in ten bins of equal width (Guo et al., arXiv:1706.04599, equation 3)."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return _described(self, predictions=number, references=datasets.Value("bool"))

    def _compute(self, predictions: list[float], references: list[bool]) -> dict[str, Any]:
        """From the probability of each chosen answer and whether it was right."""
        confidence, right = np.array(predictions), np.array(references, dtype=float)
        place = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
        bins = [
            {
                "above": number / _BINS,
                "questions": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(right[inside].mean()),
            }
            for number in range(_BINS)
            if (inside := place == number).any()
        ]
        error = sum(each["questions"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / len(right)
        return {"calibration_error": float(error), "bins": bins}


def _described(metric: evaluate.Metric, **features: Any) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=type(metric).__doc__ or "", citation="", inputs_description="", features=datasets.Features(**features)
    )
