"""What architecture a model has: its configuration, refused where the recipe cannot train it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from dsrecipes.config.adapter import adapter_folder, read_head
from dsrecipes.config.schema import ModelConfig
from dsrecipes.errors import UserError
from dsrecipes.io.hub import damaged
from dsrecipes.model.task import accepts_text, class_names, loading_class
from dsrecipes.model.weights_source import explain_load_error, weights_source
from dsrecipes.runs.weights import check_readable, loaded_files

_TASKS = {
    "AutoModelForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "a causal language model"),
    "AutoModelForMultipleChoice": ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "an encoder for multiple choice"),
    "AutoModelForSequenceClassification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "a classifier"),
}
"""Auto class -> (its table in transformers, the task in words)."""

_COUNTS = re.compile(r"(?:.*_)?(?:(layers?|blocks)|labels|heads?|experts|size|dim|embd)")
"""Keys of config.json that hold a count; the group marks counts of layers."""
_MAX_LAYERS, _MAX_SIZE = 2000, 10_000_000


def needs_trained_head(auto_class: str) -> bool:
    """Whether a checkpoint for this task must bring its head; the heads of other tasks may start from random weights."""
    return auto_class == "AutoModelForCausalLM"


def load_config(options: ModelConfig, auto_class: str) -> PretrainedConfig:
    """Load the model's configuration, and refuse it where the recipe cannot train the model.

    Raises:
        UserError: no such model, hub not reachable, made for another task, or its weights cannot be read.
    """
    name, from_options = weights_source(options)
    adapter = adapter_folder(options.model_name_or_path)
    if not options.from_scratch:
        folders = [folder for folder in (Path(name), adapter) if folder and folder.is_dir()]
        check_readable([path for folder in folders for path in loaded_files(folder)])
    try:
        # As a dict first: building the configuration makes lists of these lengths (labels, layer types).
        _check_counts(PretrainedConfig.get_config_dict(name, revision=options.model_revision)[0])
        config = AutoConfig.from_pretrained(name, **from_options)
    except damaged() as error:
        raise explain_load_error(error, options) from error
    if adapter is not None:
        read_head(adapter, config)
    if auto_class in _TASKS and not _is_trainable_for(auto_class, config, options.from_scratch):
        kind = ", ".join(config.architectures or []) or config.model_type
        task = _TASKS[auto_class][1]
        raise UserError("DSR208", f"model {options.model_name_or_path} is a {kind}; this recipe trains {task}")
    return config


def _is_trainable_for(auto_class: str, config: PretrainedConfig, from_scratch: bool) -> bool:
    table = _TASKS[auto_class][0]
    if auto_class == "AutoModelForCausalLM" and accepts_text(config):
        return True
    # A class of the model's own repository: what it is made for is not known.
    if hasattr(config, "auto_map"):
        return True
    if config.model_type not in getattr(modeling_auto, table):
        return False
    architectures = set(config.architectures or [])
    if from_scratch or not architectures or not needs_trained_head(auto_class):
        return True
    return bool(class_names(table) & architectures)


def _check_counts(config: dict[str, Any]) -> None:
    """Refuse sizes that would keep transformers busy for hours, or look like a fault of torch (ValueError)."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
            continue
        match = _COUNTS.fullmatch(str(key))
        if match and isinstance(value, int):
            maximum = _MAX_LAYERS if match[1] else _MAX_SIZE
            # Some configurations write -1 for none.
            if not -1 <= value <= maximum:
                raise ValueError(f"{key} is {value} in its config.json, which is not a number from 0 to {maximum:,}")


def empty_model(config: PretrainedConfig, auto_class: str, trust: bool, **options: Any) -> PreTrainedModel:
    """Build the model on the meta device, without weights; under ZeRO-3 before TrainConfig, which would shard it."""
    with torch.device("meta"):
        return loading_class(auto_class, config).from_config(copy.deepcopy(config), trust_remote_code=trust, **options)
