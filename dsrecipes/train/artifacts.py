"""Which files of a run folder describe the run? config.yaml, environment.json, data.json, ds_config.json, metrics.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dsrecipes.config.batch import Batch
from dsrecipes.config.flags import idle_values
from dsrecipes.config.schema import Config
from dsrecipes.config.zero_values import ENGINE_KEYS
from dsrecipes.data.sequences import Sequences
from dsrecipes.data.sources import MixedSplit
from dsrecipes.data.split import Split
from dsrecipes.io.disk import write_whole
from dsrecipes.runs.folder import RunFolder
from dsrecipes.train.header import source_facts
from dsrecipes.train.setup import RunSetup
from dsrecipes.train.trainer import RecipeTrainer
from dsrecipes.zero.internals import engine_config

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
"""Whose versions are recorded."""
_NOT_REPEATED = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run")
"""Flags of this start alone, which config.yaml leaves out."""
_PATHS = ("dataset", "eval_dataset", "model_name_or_path", "deepspeed")
_SECRETS = ("token", "key", "secret", "password")
"""Parts of the names of flags whose values are written nowhere."""


def write_start(folder: RunFolder, config: Config, setup: RunSetup) -> None:
    """Write config.yaml, which runs the same again, and environment.json; no token or key is written."""
    title = f"# {config.layers.recipe.name}: the same again\n#   dsrecipes train --config {folder.config}\n"
    values = _values_to_repeat(config, setup)
    write_whole(folder.config, title + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    environment = _environment(config, setup)
    write_whole(folder.environment, json.dumps(environment, indent=1, ensure_ascii=False) + "\n")


def _values_to_repeat(config: Config, setup: RunSetup) -> dict[str, Any]:
    """Collect the values that were given, as the run used them."""
    layers = config.layers
    module = layers.recipe.module
    is_shipped_name = "." not in str(module) or str(module).startswith("dsrecipes.recipes.")
    recipe = layers.recipe.name if is_shipped_name and not isinstance(module, Path) else str(module)
    values: dict[str, Any] = {"recipe": str(recipe)}
    values["profile"] = layers.profile if layers.why_profile != "the only one" else "auto"
    # defaults among the batch keys may have given way to what the user set
    batch = Batch(setup.micro, setup.accumulation, setup.ranks.world).values()
    used = {**vars(config.model), **vars(config.data), **config.train, **batch}
    # the recorded ZeRO JSON sets these again, and a value given twice is a contradiction
    by_json = {*ENGINE_KEYS, "fp16", "bf16"} & set(layers.zero_json().values)
    idle = idle_values(used, setup.zero is not None)
    for key in config.given:
        if key in idle and key not in config.own:
            # the recipe sets it again; in the user's own file it would be noted as having no effect
            continue
        if key in _NOT_REPEATED or key in by_json or any(secret in key.split("_") for secret in _SECRETS):
            continue
        value = _plain(used.get(key, True))
        values[key] = _absolute(value) if key in _PATHS else value
    # null removes a key that the recipe sets
    return values | dict.fromkeys(layers.removed() - set(_NOT_REPEATED))


def _environment(config: Config, setup: RunSetup) -> dict[str, Any]:
    """Command, machine, ranks and versions, and where each value came from."""
    return {
        "command": shlex.join(_without_secrets(sys.argv)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": setup.device,
        "devices": _devices(),
        "ranks": setup.ranks.world,
        "precision": setup.precision,
        "engine": setup.name(),
        "fallback": setup.fallback,
        "packages": {name: _version(name) for name in _PACKAGES},
        "origins": {key: origin for key, (_, origin) in config.layers.merged().items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _absolute(value: Any) -> Any:
    """Make a path that exists, or those of several data sets, independent of the working directory; keep other values."""
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    if isinstance(value, dict):
        return value | {"path": _absolute(value["path"])}
    is_path = isinstance(value, str) and Path(value).expanduser().exists()
    return str(Path(value).expanduser().absolute()) if is_path else value


def _plain(value: Any) -> Any:
    """Replace enumerations by their values, which YAML can hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def write_data(
    folder: RunFolder,
    splits: dict[str, Split | MixedSplit],
    sequences: dict[str, Sequences],
    streamed: dict[str, Any] | None,
) -> None:
    """Write data.json: what became of each split's rows, and a histogram of their lengths in tokens unless it is streamed."""
    facts: dict[str, dict[str, Any]] = {"train": streamed} if streamed else {}
    for name, split in splits.items():
        counts, edges = np.histogram(sequences[name].row_lengths(), bins=24)
        lengths = {"edges": edges.tolist(), "counts": counts.tolist()}
        facts[name] = asdict(split.stats) | {"sequences": len(sequences[name]), "lengths": lengths}
        sources = source_facts(split, sequences[name])
        if sources:
            facts[name]["sources"] = sources
        class_weights = sequences[name].class_weights
        if class_weights is not None:
            facts[name]["class_weights"] = class_weights.tolist()
    write_whole(folder.data, json.dumps(facts, ensure_ascii=False) + "\n")


def _without_secrets(argv: list[str]) -> list[str]:
    """The words of a command line without flags that carry a token, their values, and what looks like one."""
    words, secret = [], False
    for word in argv:
        if word.startswith("--"):
            secret = any(part in _SECRETS for part in re.split(r"[-_]", word.partition("=")[0].lower()))
        # a token may also stand where no flag names it
        if not secret and "hf_" not in word:
            words.append(word)
    return words


def _devices() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def write_ds_config(folder: RunFolder, trainer: RecipeTrainer) -> None:
    """Write ds_config.json as the engine took it; no `auto` is left in it."""
    config = engine_config(trainer.accelerator)
    # JSON has no infinity, which json.dumps writes all the same; other parsers would refuse the file
    text = json.dumps(config, indent=1, default=str).replace("Infinity", "2147483647")
    write_whole(folder.ds_config, text + "\n")


def write_metrics(folder: RunFolder, metrics: dict[str, Any]) -> None:
    """Write metrics.json."""
    write_whole(folder.metrics, json.dumps(metrics, indent=1, ensure_ascii=False, default=str) + "\n")
