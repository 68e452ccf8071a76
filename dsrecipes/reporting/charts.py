"""Which curves does a report draw? Plain numbers for report.js, and the same numbers for the table below each chart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dsrecipes.reporting.recorded import RecordedRun, as_mapping, is_number
from dsrecipes.runs.figures import FIGURES, chart_titles

_POINTS = 4000
"""Points of one line, shared by the runs, so that all charts together stay below a megabyte."""
_TABLE_ROWS = 100
"""Rows of the table below a chart."""


@dataclass(frozen=True)
class Series:
    """One line of a chart; `run` is the index of its run, `part` train, validation or empty."""

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
    """Lines over the training step (`kind` line), or counts over lengths (`kind` bars)."""

    key: str
    kind: str
    series: list[Series] = field(default_factory=list)
    gaps: int = 0
    """Values that are not finite numbers."""
    split: str = ""

    def table(self) -> list[list[float | None]]:
        """A row per x: x and the value of each series; if there are too many, every n-th, with the first and the last."""
        columns = [dict(zip(series.x, series.y, strict=True)) for series in self.series]
        steps = sorted(set().union(*columns))
        if len(steps) > _TABLE_ROWS:
            steps = [steps[i * (len(steps) - 1) // (_TABLE_ROWS - 1)] for i in range(_TABLE_ROWS)]
        return [[step, *(column.get(step) for column in columns)] for step in steps]


def curves(runs: list[RecordedRun]) -> list[Chart]:
    """A chart for each figure that a run logged, in the order of FIGURES."""
    charts = []
    for name in chart_titles("en"):
        lines = {key: figure.line for key, figure in FIGURES.items() if figure.chart == name}
        if name == "loss":
            lines |= _losses_by_source(runs)
        chart = _chart(name, lines, runs)
        if chart.series:
            charts.append(chart)
    return charts


def _chart(name: str, lines: dict[str, str], runs: list[RecordedRun]) -> Chart:
    """A chart of keys of log.jsonl; `lines` gives the part that each key is."""
    series, gaps = [], 0
    for number, run in enumerate(runs):
        for key, part in lines.items():
            values = [(entry["step"], _finite(entry[key])) for entry in run.log if entry.get(key) is not None]
            # A run that diverged logs "nan" as text. Its line has a gap there, and the page says how many.
            missing = sum(value is None for _, value in values)
            gaps += missing
            if missing < len(values):
                points = thin(values, _POINTS // len(runs))
                series.append(Series(number, run.name, part, [x for x, _ in points], [y for _, y in points]))
    return Chart(name, "line", series, gaps)


def _finite(value: object) -> float | None:
    """A number with six digits, which is what a chart can show; None for what is not a finite number."""
    return float(f"{value:.6g}") if is_number(value) else None


def _losses_by_source(runs: list[RecordedRun]) -> dict[str, str]:
    """Key of the validation loss on one data set -> name of the data set."""
    names = _in_order(name for run in runs for name in as_mapping(run.splits.get("validation", {}).get("sources")))
    return {f"eval_{name}_loss": name for name in names}


def thin(points: list[tuple[float, float | None]], limit: int) -> list[tuple[float, float | None]]:
    """At most `limit` points: the lowest and the highest of each stretch, so that no spike is lost; gaps stay."""
    if len(points) <= limit:
        return points
    # Two points remain of each stretch, so there are limit / 2 stretches.
    size = -(-len(points) * 2 // limit)
    selected: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [(y, index) for index, (_, y) in enumerate(stretch) if y is not None]
        extremes = {min(finite)[1], max(finite)[1]} if finite else {0}
        selected += [stretch[index] for index in sorted(extremes)]
    return selected


def lengths(runs: list[RecordedRun]) -> list[Chart]:
    """The lengths of the rows of each split, one chart per split."""
    charts = []
    for split in _in_order(name for run in runs for name in run.splits):
        series = []
        for number, run in enumerate(runs):
            histogram = as_mapping(run.splits.get(split, {}).get("lengths"))
            edges, counts = histogram.get("edges"), histogram.get("counts")
            if isinstance(edges, list) and isinstance(counts, list) and _is_histogram(edges, counts):
                middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
                series.append(Series(number, run.name, "", middles, counts))
        if series:
            charts.append(Chart("lengths", "bars", series, split=split))
    return charts


def _is_histogram(edges: list[object], counts: list[object]) -> bool:
    return len(edges) == len(counts) + 1 and all(map(is_number, [*edges, *counts]))


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
