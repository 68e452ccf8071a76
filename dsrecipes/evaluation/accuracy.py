"""Which metric of Hugging Face's evaluate library does training on questions report? Accuracy, by subject and group."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from dsrecipes.evaluation.choice_scores import accuracy


class Accuracy(evaluate.Metric):
    """Share of right answers over all, by subject and by group of subjects.

    A class of ours, since `evaluate.load` downloads its code from the hub. Commands on a finished run take the function of
    choice_scores instead: evaluate imports datasets, which takes a second.
    """

    def _info(self) -> evaluate.MetricInfo:
        number, text = datasets.Value("int64"), datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="",
            features=datasets.Features(predictions=number, references=number, subjects=text),
        )

    def _compute(self, predictions: list[int], references: list[int], subjects: list[str]) -> dict[str, Any]:
        return accuracy(predictions, references, subjects)
