"""loss_curve.png: train and validation loss over the steps."""

from __future__ import annotations

from pathlib import Path

from dsrecipes.runs.log import read_log


def draw_curve(log: Path, picture: Path, title: str) -> None:
    """Draw the losses of log.jsonl (nats per token or per question) to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (
        ("loss", "train", {"linewidth": 1.2}),
        ("eval_loss", "validation", {"marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture)
