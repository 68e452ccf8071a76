"""What does a run print at its end? The result, where things are, and the next commands."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from dsrecipes.base import RunResult
from dsrecipes.config.schema import Config
from dsrecipes.data.split import describe_dropped
from dsrecipes.errors import plural
from dsrecipes.runs.figures import FIGURES
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.reference import describe_verification
from dsrecipes.train.header import line


def footer(config: Config, result: RunResult, folder: RunFolder, seconds: float, data: dict[str, Any] | None = None) -> str:
    """Describe a run that has ended.

    Args:
        config: of the run.
        result: its last step and figures.
        folder: where things are.
        seconds: that it took.
        data: what became of a stream's rows.
    """
    form = "plain Hugging Face form" + (", adapter" if config.model.lora_r else "")
    lines = [line("done", f"step {result.step:,}", *_describe_figures(config, result.metrics), f"{seconds:.0f} s")]
    if data:
        lines.append(line("streamed", _describe_stream(data)))
    lines.append(line("model", f"{folder.model} ({form})"))
    # missing with --verify_model false, and where verification failed
    if folder.verified.is_file():
        lines.append(line("verified", describe_verification(json.loads(folder.verified.read_text()))))
    lines.append(line("curve", f"{folder.curve}, figures {folder.metrics}, log {folder.log}"))
    if folder.page.is_file():
        lines.append(line("report", str(folder.page)))
    lines.append(line("next", f"{_command('tensorboard')} --logdir {folder.path}"))
    lines.append(line("", f"{_command('dsrecipes')} train --config {folder.config}   (the same again)"))
    return "\n".join(lines)


def _describe_figures(config: Config, metrics: dict[str, Any]) -> list[str]:
    figures = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    shown = [f"train loss {figures['train_loss']:.4f}"] if "train_loss" in figures else []
    for key, figure in FIGURES.items():
        if figure.footer and key in figures:
            baseline = figures.get(f"{key}_majority")
            # an accuracy means little without what a constant answer reaches
            remark = f" (always the commonest answer: {baseline:.4g})" if baseline is not None else ""
            shown.append(f"{figure.footer} {figures[key]:.4g}{remark}")
    sources = config.data.eval_sources or config.data.sources
    losses = [
        f"{source.name} {figures[f'eval_{source.name}_loss']:.4g}"
        for source in sources
        if f"eval_{source.name}_loss" in figures
    ]
    return [*shown, f"validation loss by source: {', '.join(losses)}"] if losses else shown


def _describe_stream(data: dict[str, Any]) -> str:
    parts = [
        f"trained on {plural(data['used_rows'], 'row')}, {plural(data['used_tokens'], 'token')}",
        f"{data['epochs']:.3g} epochs by bytes",
    ]
    if data["dropped"]:
        # `rows` counts what format_row accepted, and a bad row is one that it refused
        read = data["rows"] + data["dropped"].get("bad row", 0)
        dropped = describe_dropped(data["dropped"])
        parts.append(f"of {plural(read, 'row')} read, some ahead, dropped {dropped}")
    return ", ".join(parts)


def _command(name: str) -> str:
    """A command as it can be typed here: its name, or its path where the environment is not activated."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) or not path.is_file():
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
