"""What defines a run: recorded in each checkpoint, and compared when a run goes on from it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dsrecipes.config.adapter import adapter_folder, base_model
from dsrecipes.config.schema import Config
from dsrecipes.errors import UserError, nearest
from dsrecipes.io.paths import starter_path
from dsrecipes.model.weights_source import local_model
from dsrecipes.runs.checkpoint_manifest import read_manifest
from dsrecipes.runs.weights import loaded_files
from dsrecipes.train.state import Prepared

_TRAIN = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "seed", "data_seed",
    "train_sampling_strategy",
)  # fmt: skip
_MODEL = (
    "from_scratch", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "lora_r", "lora_alpha",
    "lora_dropout", "lora_target_modules",
)  # fmt: skip
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 14


def run_identity(prepared: Prepared) -> dict[str, Any]:
    """The run's terms, as JSON knows them; the keys are flags where there is one.

    Evaluating, logging and saving are no terms: they change no weight.
    """
    config, setup = prepared.config, prepared.setup
    terms = {
        "recipe": config.layers.recipe.name,
        "code": _code(prepared.recipe),
        "model": _digest(_settings(prepared.model_config.to_dict())),
        "weights": _weights(config, getattr(prepared.model_config, "_commit_hash", None)),
        "data": prepared.rows.stream.fingerprint
        if prepared.rows.stream
        else prepared.rows.splits["train"].stats.fingerprint,
        "mixture": _mixture(prepared),
        "max_length": config.data.max_length,
        "packing": config.data.packing,
        "class_weights": config.data.class_weights or None,
        "global_batch_size": setup.batch,
        "max_steps": prepared.steps,
        "precision": setup.precision,
        **{key: setup.engine[key] for key in ("optimizer", "scheduler") if key in setup.engine},
        **{key: config.train[key] for key in _TRAIN},
        **{key: getattr(config.model, key) for key in _MODEL},
    }
    return json.loads(json.dumps(terms, default=lambda value: str(getattr(value, "value", value))))


def _mixture(prepared: Prepared) -> str | None:
    """How many rows of each source an epoch draws, in how many sequences; None where it takes all rows.

    A longer run may have an epoch that packs worse, and so more sequences in all epochs.
    """
    if prepared.rows.stream:
        return None
    data = prepared.sequences["train"]
    rows = ", ".join(f"{name} {count}" for name, count in data.counts.items())
    return f"{rows} in {len(data)} sequences" if rows else None


def differences(before: dict[str, Any], now: dict[str, Any], allowed: list[str]) -> dict[str, tuple[Any, Any]]:
    """Term -> (there, here) where they differ and may not.

    Raises:
        UserError: `allowed` names no term.
    """
    for key in allowed:
        if key not in {*before, *now}:
            raise UserError(f"--allow_changed {key}: no such term{nearest(key, now)}; there are {', '.join(now)}")
    keys = [key for key in {**before, **now} if key not in allowed and before.get(key) != now.get(key)]
    return {key: (before.get(key), now.get(key)) for key in keys}


def check_identity(checkpoint: Path, now: dict[str, Any], allowed: list[str]) -> list[str]:
    """Refuse to go on with something else than the checkpoint's run, showing the difference.

    Returns:
        The terms that changed and may.

    Raises:
        UserError: one changed that may not, or the checkpoint holds no state to go on from.
    """
    made = read_manifest(checkpoint)
    before = made["contract"]
    if not any(name.startswith("rng_state") for name in made["files"]):
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} holds the model alone (--save_only_model true); a run cannot go on from "
            "it, but start from it with --model_name_or_path"
        )
    changed = differences(before, now, allowed)
    if changed:
        told = "; ".join(f"{key} is {there} there and {here} here" for key, (there, here) in changed.items())
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} is of another run: {told}. Give the same again, "
            f"or let it through with --allow_changed {' '.join(changed)}"
        )
    return [key for key in allowed if before.get(key) != now.get(key)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _settings(model: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration without what says where it came from and how it is run."""
    passing = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
    return {key: value for key, value in model.items() if key not in passing and not key.startswith("_attn")}


def _code(recipe: type) -> str:
    """Version of the library, and a hash of what of it shapes a run and of the recipe's own module."""
    here = Path(__file__).parents[1]
    shaping = [path for package in ("data", "model", "zero", "train") for path in (here / package).glob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in sorted(shaping)]
    texts += [inspect.getsource(sys.modules[each.__module__]) for each in recipe.__mro__[:-2]]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
    try:
        version = importlib.metadata.version("dsrecipes")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return f"dsrecipes {version} ({digest})"


def _weights(config: Config, commit: str | None) -> str:
    """What the weights at the start were: of a folder the tensors' names and shapes and samples of their bytes."""
    if config.model.from_scratch:
        return f"random, seed {config.train['seed']}"
    name = config.model.model_name_or_path or ""
    adapter, base = adapter_folder(name), base_model(name)
    folder = Path(local_model(starter_path(base)))
    weights = _sampled(folder) if folder.is_dir() else f"{base} {commit or config.model.model_revision}"
    return weights if adapter is None else f"{_sampled(adapter)} on {weights}"


def _sampled(folder: Path) -> str:
    """A hash of a folder's tensors: names, shapes and samples of their bytes."""
    hashed = hashlib.sha256()
    for path in loaded_files(folder):
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            hashed.update(json.dumps([(name, file.get_slice(name).get_shape()) for name in names]).encode())
        size = path.stat().st_size
        with path.open("rb") as data:
            for sample in range(_SAMPLES):
                data.seek(size * sample // _SAMPLES)
                hashed.update(data.read(_SAMPLE_BYTES))
    return hashed.hexdigest()[:16]
