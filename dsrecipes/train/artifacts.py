"""Write the files of a run folder that describe the run."""

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
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dsrecipes.config.batch import Batch
from dsrecipes.config.flags import idle_values
from dsrecipes.config.zero_values import ENGINE_KEYS
from dsrecipes.data.sources import MixedSplit
from dsrecipes.data.split import Split
from dsrecipes.io.disk import write_whole
from dsrecipes.runs.folder import RunFolder
from dsrecipes.train.summary import _sources
from dsrecipes.zero.internals import engine_config

if TYPE_CHECKING:
    from dsrecipes.config.schema import Config
    from dsrecipes.data.sequences import Sequences
    from dsrecipes.train.setup import RunSetup
    from dsrecipes.train.trainer import RecipeTrainer

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


_PATHS = ("dataset", "eval_dataset", "model_name_or_path", "deepspeed")


_SECRETS = ("token", "key", "secret", "password")


def write_start(folder: RunFolder, config: Config, place: RunSetup) -> None:
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
            values[key] = _absolute(value) if key in _PATHS else value
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


def _absolute(value: Any) -> Any:
    """A path that is there, or those of several data sets, independent of the working directory; other values as they are."""
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    if isinstance(value, dict):
        return value | {"path": _absolute(value["path"])}
    is_path = isinstance(value, str) and Path(value).expanduser().exists()
    return str(Path(value).expanduser().absolute()) if is_path else value


def _plain(value: Any) -> Any:
    """Enumerations as their values, which YAML can hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def write_data(
    folder: RunFolder,
    splits: dict[str, Split | MixedSplit],
    sequences: dict[str, Sequences],
    streamed: dict[str, Any] | None,
) -> None:
    """data.json: what became of each split's rows, and a histogram of their lengths in tokens where none is streamed."""
    told = {"train": streamed} if streamed else {}
    for name, split in splits.items():
        counts, edges = np.histogram(sequences[name].row_lengths(), bins=24)
        lengths = {"edges": edges.tolist(), "counts": counts.tolist()}
        told[name] = asdict(split.stats) | {"sequences": len(sequences[name]), "lengths": lengths}
        if sources := _sources(split, sequences[name]):
            told[name]["sources"] = sources
        if sequences[name].class_weights is not None:
            told[name]["class_weights"] = sequences[name].class_weights.tolist()
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
    config = engine_config(trainer.accelerator)
    text = json.dumps(config, indent=1, default=str).replace("Infinity", "2147483647")
    write_whole(folder.ds_config, text + "\n")


def write_metrics(folder: RunFolder, metrics: dict[str, Any]) -> None:
    """metrics.json."""
    write_whole(folder.metrics, json.dumps(metrics, indent=1, ensure_ascii=False, default=str) + "\n")
