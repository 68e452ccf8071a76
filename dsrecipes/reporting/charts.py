"""The curves of runs as plain numbers: what report.js draws, and what a table beside each chart tells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dsrecipes.reporting.recorded import RecordedRun, as_mapping, is_number

_CURVES = {
    "loss": {"loss": "train", "eval_loss": "validation"},
    "accuracy": {"eval_accuracy": "validation"},
    "learning_rate": {"learning_rate": ""},
    "grad_norm": {"grad_norm": ""},
    "speed": {"tokens_per_second": ""},
    "memory": {"peak_memory_gb": ""},
}
"""Charts by name: keys of log.jsonl, and which of two lines each is."""
_POINTS = 4000
"""Points of a chart's key, shared by the runs: all charts together stay under a megabyte."""
_TABLE_ROWS = 100


@dataclass(frozen=True)
class Series:
    """One line of a chart; `run` is the number of its run, `part` train, validation or nothing."""

    run: int
    name: str
    part: str
    x: list[float]
    y: list[float | None]

    def points(self) -> list[tuple[float, float]]:
        """(x, y) without gaps."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None]


@dataclass(frozen=True)
class Chart:
    """Lines over the training step, or counts over lengths (`kind` bars)."""

    key: str
    kind: str
    series: list[Series] = field(default_factory=list)
    gaps: int = 0
    """Values that are no finite numbers."""
    split: str = ""

    def table(self) -> list[list[float | None]]:
        """x and the value of each series, a row for each x; every n-th of many, the first and the last among them."""
        columns = [dict(zip(each.x, each.y, strict=True)) for each in self.series]
        steps = sorted(set().union(*columns))
        if len(steps) > _TABLE_ROWS:
            steps = [steps[i * (len(steps) - 1) // (_TABLE_ROWS - 1)] for i in range(_TABLE_ROWS)]
        return [[step, *(column.get(step) for column in columns)] for step in steps]


def curves(runs: list[RecordedRun]) -> list[Chart]:
    """A chart of each figure that a run logged."""
    charts = []
    for name, parts in _CURVES.items():
        series, gaps = [], 0
        if name == "loss":
            parts = parts | _losses_by_source(runs)
        for number, run in enumerate(runs):
            for key, part in parts.items():
                points = [(line["step"], line[key]) for line in run.log if line.get(key) is not None]
                values = [(step, float(f"{value:.6g}") if is_number(value) else None) for step, value in points]
                gaps += sum(value is None for _, value in values)
                if any(value is not None for _, value in values):
                    kept = thin(values, _POINTS // len(runs))
                    series.append(Series(number, run.name, part, [x for x, _ in kept], [y for _, y in kept]))
        if series:
            charts.append(Chart(name, "line", series, gaps))
    return charts


def _losses_by_source(runs: list[RecordedRun]) -> dict[str, str]:
    """Keys of the validation losses of single data sets -> the name of the data set."""
    names = _in_order(name for run in runs for name in as_mapping(run.splits.get("validation", {}).get("sources")))
    return {f"eval_{name}_loss": name for name in names}


def thin(points: list[tuple[float, float | None]], limit: int) -> list[tuple[float, float | None]]:
    """At most `limit` points: the lowest and the highest of each stretch, so that no spike is lost; gaps stay."""
    if len(points) <= limit:
        return points
    size = -(-len(points) * 2 // limit)
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if points[i][1] is not None]
        ends = {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])} if finite else {start}
        kept += [points[i] for i in sorted(ends)]
    return kept


def lengths(runs: list[RecordedRun]) -> list[Chart]:
    """How long the rows of each split are, a chart a split."""
    charts = []
    for split in _in_order(name for run in runs for name in run.splits):
        series = []
        for number, run in enumerate(runs):
            told = run.splits.get(split, {}).get("lengths")
            edges, counts = (told.get("edges"), told.get("counts")) if isinstance(told, dict) else (None, None)
            if _is_histogram(edges, counts):
                middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
                series.append(Series(number, run.name, "", middles, counts))
        if series:
            charts.append(Chart("lengths", "bars", series, split=split))
    return charts


def _is_histogram(edges: object, counts: object) -> bool:
    both = isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1
    return both and all(map(is_number, [*edges, *counts]))


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
