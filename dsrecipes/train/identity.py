"""What defines a run, and why is a resume refused? Each checkpoint records it, and a resumed run is compared with it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dsrecipes.config.adapter import adapter_folder, base_model, lora_targets
from dsrecipes.config.schema import Config, ModelConfig
from dsrecipes.errors import UserError, nearest
from dsrecipes.io.paths import starter_path
from dsrecipes.model.weights_source import local_model
from dsrecipes.runs.checkpoint_manifest import read_manifest
from dsrecipes.runs.weights import loaded_files
from dsrecipes.train.state import Prepared

STATE_VERSION = 1
"""Raise this when a change to the library makes a resumed run continue differently than it would have before: another order
or packing of rows, other tokens from the same rows, another loss, other contents of a checkpoint. Other words, messages,
files of a run folder or speed are no reason: no resume should end because of them, and so the library's own source is not
hashed. Tests do not notice a forgotten raise; tests/behaviour/test_resume.py and the figures of tests/train/ show where the
numbers of a run come from."""

_TRAIN = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "train_sampling_strategy",
)
_MODEL = (
    "from_scratch",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
)
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 14
"""How many pieces of a weights file are hashed, and their size: reading 14 GB would take longer than a start."""


def run_identity(prepared: Prepared) -> dict[str, Any]:
    """List the terms of a run as JSON values; the keys are flags where there is one.

    Values are compared after parsing, so that `1 5` and `neg=1,pos=5` are the same class weights. How often a run evaluates,
    logs and saves is no term, because it changes no weight.
    """
    config, setup, rows = prepared.config, prepared.setup, prepared.rows
    train = config.train
    class_weights = prepared.train_data.sample.class_weights if rows.stream is None else None
    terms: dict[str, Any] = {
        "state_version": STATE_VERSION,
        "recipe": config.layers.recipe.name,
        "code": _own_code(prepared.recipe),
        "model": _digest(_settings(prepared.model_config.to_dict())),
        "weights": _weights(config, getattr(prepared.model_config, "_commit_hash", None)),
        "data": rows.stream.fingerprint if rows.stream else rows.splits["train"].stats.fingerprint,
        "mixture": _mixture(prepared),
        "max_length": config.data.max_length,
        "packing": config.data.packing,
        "class_weights": None if class_weights is None else class_weights.tolist(),
        "global_batch_size": setup.batch,
        "max_steps": prepared.steps,
        "precision": setup.precision,
        "optim_args": _assignments(train["optim_args"]),
        "lora_target_modules": _targets(config.model),
    }
    # blocks of the ZeRO JSON replace Trainer's optimizer and schedule, so their values count instead of the flags
    terms |= {key: setup.engine[key] for key in ("optimizer", "scheduler") if key in setup.engine}
    terms |= {key: train[key] for key in _TRAIN} | {key: getattr(config.model, key) for key in _MODEL}
    # as a manifest will give them back: tuples as lists, enumerations as text
    return json.loads(json.dumps(terms, default=lambda value: str(getattr(value, "value", value))))


def check_identity(checkpoint: Path, now: dict[str, Any], allowed: list[str]) -> list[str]:
    """Refuse to resume something else than the checkpoint's run, and show the differences.

    Returns:
        The terms that differ and may.

    Raises:
        UserError: a term differs that may not, or the checkpoint holds no state that can be resumed.
    """
    manifest = read_manifest(checkpoint)
    before = manifest["contract"]
    # before the terms are compared: no --allow_changed makes such a checkpoint one to resume from
    if not any(name.startswith("rng_state") for name in manifest["files"]):
        raise UserError(
            "DSR374",
            f"--resume_from_checkpoint: {checkpoint} holds the model alone (--save_only_model true); a run cannot resume from "
            "it, but start from it with --model_name_or_path",
        )
    if "state_version" not in before:
        raise UserError(
            "DSR375",
            f"--resume_from_checkpoint: {checkpoint} was written by an earlier dsrecipes, whose checkpoints do not say "
            "whether this version would continue them correctly. Finish that run with the version that began it (see "
            "environment.json in its folder), or start a new run from its weights with --model_name_or_path",
        )
    changed = differences(before, now, allowed)
    if changed:
        listed = "; ".join(f"{key} is {there} there and {here} here" for key, (there, here) in changed.items())
        raise UserError(
            "DSR376",
            f"--resume_from_checkpoint: {checkpoint} is of another run: {listed}. Give the same values again, or accept the "
            f"change with --allow_changed {' '.join(changed)}",
        )
    return [key for key in allowed if before.get(key) != now.get(key)]


def differences(before: dict[str, Any], now: dict[str, Any], allowed: list[str]) -> dict[str, tuple[Any, Any]]:
    """Map each term that differs, and may not, to its values (in the checkpoint, now).

    Raises:
        UserError: `allowed` names no term.
    """
    for key in allowed:
        if key not in {*before, *now}:
            raise UserError("DSR377", f"--allow_changed {key}: no such term{nearest(key, now)}; there are {', '.join(now)}")
    keys = [key for key in {**before, **now} if key not in allowed and before.get(key) != now.get(key)]
    return {key: (before.get(key), now.get(key)) for key in keys}


# ---- terms ----


def _mixture(prepared: Prepared) -> dict[str, Any] | None:
    """How many rows of each source an epoch draws, in how many sequences; None where it takes all rows.

    The sequences count, because a longer run may have an epoch that packs worse, and then all its epochs have more.
    """
    if prepared.rows.stream is not None:
        return None
    data = prepared.sequences["train"]
    return {"rows": dict(data.counts), "sequences": len(data)} if data.counts else None


def _assignments(text: str | None) -> dict[str, str] | None:
    """--optim_args as names and values, whatever their order and spaces."""
    if not text:
        return None
    pairs = (part.partition("=") for part in text.split(",") if part.strip())
    return {name.strip(): value.strip() for name, _, value in sorted(pairs)}


def _targets(model: ModelConfig) -> list[str] | str:
    targets = lora_targets(model.lora_target_modules)
    return sorted(targets) if isinstance(targets, list) else targets


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _settings(model: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration without what says where it came from and how it is run."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
    return {key: value for key, value in model.items() if key not in ignored and not key.startswith("_attn")}


def _own_code(recipe: type) -> str | None:
    """A hash of the modules of a user's own recipe, without comments, docstrings and layout; None for a shipped recipe."""
    modules = [sys.modules[cls.__module__] for cls in recipe.__mro__ if cls.__module__ not in ("abc", "builtins")]
    own = [module for module in modules if not module.__name__.startswith("dsrecipes.")]
    if not own:
        return None
    code = "\0".join(_without_words(inspect.getsource(module)) for module in own)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _without_words(source: str) -> str:
    """Python code without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            statements = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
            # a function that was only a docstring still needs a statement
            vars(node)["body"] = statements or [ast.Pass()]
    return ast.unparse(tree)


def _weights(config: Config, commit: str | None) -> str:
    """What the weights were at the start: of a folder a hash of names, shapes and samples of their bytes."""
    if config.model.from_scratch:
        return f"random, seed {config.train['seed']}"
    name = config.model.model_name_or_path or ""
    adapter, base = adapter_folder(name), base_model(name)
    folder = Path(local_model(starter_path(base)))
    # a commit of the hub cannot change, so its files need not be read
    weights = _hash_samples(folder) if folder.is_dir() else f"{base} {commit or config.model.model_revision}"
    return weights if adapter is None else f"{_hash_samples(adapter)} on {weights}"


def _hash_samples(folder: Path) -> str:
    """Hash a folder's tensors: names, shapes and samples of their bytes."""
    hashed = hashlib.sha256()
    for path in loaded_files(folder):
        # names and shapes are hashed whole, since they are small and reading them loads no tensor
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            hashed.update(json.dumps([(name, file.get_slice(name).get_shape()) for name in names]).encode())
        size = path.stat().st_size
        with path.open("rb") as data:
            for sample in range(_SAMPLES):
                data.seek(size * sample // _SAMPLES)
                hashed.update(data.read(_SAMPLE_BYTES))
    return hashed.hexdigest()[:16]
