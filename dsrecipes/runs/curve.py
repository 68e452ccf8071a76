"""How loss_curve.png is drawn: train and validation loss over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsrecipes.runs.log import read_log

_LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "loss": ("train", {"linewidth": 1.2}),
    "eval_loss": ("validation", {"marker": "o", "markersize": 4}),
}
"""Key in log.jsonl -> label and style of its line."""


def draw_curve(log: Path, picture: Path, title: str) -> None:
    """Draw the losses of log.jsonl (nats per token, or per question) to a PNG."""
    # The Figure classes instead of pyplot, which keeps every figure and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = read_log(log)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, (label, style) in _LINES.items():
        points = [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), (int, float))]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    # steps are whole numbers, which the ticks of a short run would not be
    locator = axes.xaxis.get_major_locator()
    if isinstance(locator, MaxNLocator):
        locator.set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture)
