"""Which figures does an evaluation report, and what does a comparison pair item by item?

One table, METRICS. A metric is one entry: where it has a value for each item, `score` computes it from the item, which
then holds it; evaluate reports the mean, and compare the difference with its interval.

    METRICS.append(Metric("answers", "length", score=lambda item: len(item["answer"])))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsrecipes.errors import plural
from dsrecipes.evaluation import choice_scores, label_scores
from dsrecipes.evaluation.text_scores import exact_match, rouge_l

Json = dict[str, Any]


def _no_lines(figures: Json) -> Iterator[str]:
    return iter(())


def weight_of(item: Json) -> float:
    """The weight of an item in a mean loss: the sum of its labels' weights, or their number."""
    weight: float = item["weight"] if "weight" in item else item.get("tokens", 1)
    return weight


@dataclass(frozen=True)
class Metric:
    """A figure, or several that are computed together, of one task's items."""

    task: str
    """loss, choices, answers or labels: whose items it takes."""
    name: str
    """The key of its value in an item, and of the mean among the figures."""
    score: Callable[[Json], float] | None = None
    """The value of one item; None where the task's measurement has put it there, or where there is none."""
    figures: Callable[[list[Json], list[str]], Json] | None = None
    """Figures by name, of all items and the names of a classifier's labels; default: the mean of the items' values."""
    weighted: bool = False
    """An item counts by `weight_of` instead of 1."""
    summed: bool = False
    """An item's value is a sum over its tokens, already multiplied by their weights."""
    compared: bool = False
    """compare pairs it item by item; always so with a `score`."""
    lines: Callable[[Json], Iterator[str]] = _no_lines
    """Tables below the line of numbers, from all figures of the task."""

    def values(self, items: list[Json]) -> np.ndarray:
        """(items,): the values, each times its weight."""
        values = np.array([item[self.name] for item in items], dtype=float)
        return values * self.weights(items) if self.weighted and not self.summed else values

    def weights(self, items: list[Json]) -> np.ndarray:
        """(items,): what each item counts."""
        return np.array([weight_of(item) if self.weighted else 1.0 for item in items])

    def mean(self, items: list[Json]) -> float:
        """The mean of the items' values, by weight."""
        return float(self.values(items).sum() / self.weights(items).sum())

    def report(self, items: list[Json], names: list[str]) -> Json:
        """Compute its figures; none where another kind of model was measured and the items lack this value."""
        if self.figures is not None:
            return self.figures(items, names)
        return {self.name: self.mean(items)} if self.name in items[0] else {}


def _loss_figures(items: list[Json], names: list[str]) -> Json:
    """The loss of a token, its exponential, and the same by data set where there are several."""
    mean = LOSS.mean(items)
    tokens = sum(item["tokens"] for item in items)
    # exp(710) overflows a float.
    result: Json = {"loss": mean, "perplexity": math.exp(min(mean, 700)), "tokens": tokens}
    sources = dict.fromkeys(item["source"] for item in items if "source" in item)
    if len(sources) > 1:
        result["by_source"] = {
            name: _loss_figures([item for item in items if item["source"] == name], names) for name in sources
        }
    return result


def _source_lines(figures: Json) -> Iterator[str]:
    for name, values in figures.get("by_source", {}).items():
        yield f"          {name}: {number_line(values)} · {plural(values['tokens'], 'token')}"


def number_line(figures: Json) -> str:
    """The numbers among figures; tables have lines of their own."""
    return " · ".join(f"{name} {value:,.4f}" for name, value in figures.items() if isinstance(value, float))


# A name of its own, because _loss_figures takes its mean for each source too.
LOSS = Metric("loss", "loss", figures=_loss_figures, weighted=True, summed=True, compared=True, lines=_source_lines)
METRICS = [
    LOSS,
    Metric("choices", "acc", figures=choice_scores.item_accuracy, compared=True, lines=choice_scores.accuracy_lines),
    Metric("choices", "acc_norm"),
    # By bytes of UTF-8 too: a Chinese character says more than a Latin letter, which acc_norm does not consider.
    Metric("choices", "acc_bytes"),
    Metric("choices", "loss", weighted=True),
    Metric("choices", "confusion", figures=choice_scores.item_confusion, lines=choice_scores.confusion_lines),
    Metric("choices", "calibration", figures=choice_scores.item_calibration, lines=choice_scores.calibration_lines),
    Metric("answers", "rouge_l", score=lambda item: rouge_l(item["answer"], item["reference"])),
    Metric("answers", "exact_match", score=lambda item: exact_match(item["answer"], item["reference"])),
    Metric("labels", "scores", figures=label_scores.item_scores, lines=label_scores.score_lines),
    Metric("labels", "loss", weighted=True, compared=True),
    Metric("labels", "confusion", figures=label_scores.item_confusion, lines=label_scores.mistake_lines),
]
"""All metrics, in the order in which their figures are reported."""


def metrics_of(task: str) -> list[Metric]:
    """The metrics of a task."""
    return [metric for metric in METRICS if metric.task == task]


def add_scores(task: str, items: list[Json]) -> None:
    """Give each item the values of the metrics that score one."""
    for metric in metrics_of(task):
        if metric.score is not None:
            for item in items:
                item[metric.name] = metric.score(item)


def figures_of(task: str, items: list[Json], names: list[str] | None = None) -> Json:
    """All figures of a task over its items.

    Args:
        task: whose metrics are computed.
        items: as the task's measurement returns them, with scores.
        names: of a classifier's labels.
    """
    result: Json = {}
    for metric in metrics_of(task):
        result |= metric.report(items, names or [])
    return result


def compared_metrics(task: str) -> list[Metric]:
    """The metrics that have a value for each item to be paired."""
    return [metric for metric in metrics_of(task) if metric.compared or metric.score]


def figure_lines(task: str, figures: Json) -> Iterator[str]:
    """Yield the figures as text: one line of numbers, then tables."""
    yield f"          {number_line(figures)}"
    for metric in metrics_of(task):
        yield from metric.lines(figures)
