"""Which layers get a LoRA adapter, and whether an adapter folder fits its base, checked before weights are loaded."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dsrecipes.config.adapter import CONFIG, adapter_folder, base_model, lora_targets
from dsrecipes.config.schema import ModelConfig
from dsrecipes.errors import UserError, nearest, plural
from dsrecipes.io.hub import damaged, first_line
from dsrecipes.model.configuration import empty_model
from dsrecipes.model.modalities import unreached_by_text
from dsrecipes.runs.weights import check_readable


def module_pattern(names: list[str]) -> str | None:
    """A regular expression for these modules and everything below them, as peft expects; None for no names."""
    return rf"(?:{'|'.join(map(re.escape, names))})(?:\..*)?" if names else None


def check_targets(options: ModelConfig, config: PretrainedConfig, auto_class: str) -> None:
    """Refuse --lora_target_modules, or an adapter folder, that does not fit the model, before weights are loaded.

    The model is built on the meta device; under ZeRO-3 this must precede TrainConfig, which would shard it.

    Raises:
        UserError: names the value and the layers that can be given, or the adapter's tensor that does not fit.
    """
    targets = lora_targets(options.lora_target_modules)
    folder = adapter_folder(options.model_name_or_path)
    if not options.lora_r or (targets == "all-linear" and folder is None):
        return
    model = empty_model(config, auto_class, options.trust_remote_code)
    if targets != "all-linear":
        source = "--lora_target_modules" if folder is None else f"{misfit(options, folder)}: target_modules"
        is_pattern = isinstance(targets, str)
        for target in [targets] if isinstance(targets, str) else targets:
            _check_target(model, target, is_pattern, source)
    if folder is not None:
        _check_adapter_file(model, options, folder)


def misfit(options: ModelConfig, folder: Path) -> str:
    """Beginning of a message about an adapter that belongs to another model."""
    return f"the adapter {folder} does not fit its base model {base_model(options.model_name_or_path or '')}"


def _check_target(model: PreTrainedModel, target: str, is_pattern: bool, source: str) -> None:
    """Refuse a name or pattern that matches no layer, or one that cannot have an adapter of its own (UserError)."""
    modules = _reachable_modules(model)
    if is_pattern:
        matches = {name: module for name, module in modules.items() if re.fullmatch(target, name)}
    else:
        suffix = f".{target}"
        matches = {name: module for name, module in modules.items() if name == target or name.endswith(suffix)}
    tied = _tied_layers(model)
    if not any(map(_can_be_adapted, matches.values())):
        layers = [name for name, module in modules.items() if _can_be_adapted(module) and module not in tied]
        last_names = sorted({name.rpartition(".")[2] for name in layers})
        raise UserError(
            "DSR217",
            f"{source} {target}: no layer of {type(model).__name__} that can have an adapter matches"
            f"{nearest(target, last_names)}; there are {', '.join(last_names)}",
        )
    # peft would raise on the first such module only after the weights are loaded.
    for name, module in matches.items():
        if not _can_be_adapted(module):
            raise UserError(
                "DSR217",
                f"{source} {target}: it matches {name} too, a {type(module).__name__}, which cannot have an adapter: match "
                "linear layers only, such as .*\\.(q|v)_proj",
            )
        if module in tied:
            raise UserError(
                "DSR217",
                f"{source} {target}: it matches {name}, whose weight is both the input embedding and the head of this model "
                "(tie_word_embeddings), so that an adapter of one could not be merged: leave it out",
            )


def _reachable_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules by name, without those that rows of text never reach."""
    excluded = module_pattern(unreached_by_text(model))
    modules = dict(model.named_modules())
    modules.pop("", None)
    return {name: module for name, module in modules.items() if not (excluded and re.fullmatch(excluded, name))}


def _tied_layers(model: PreTrainedModel) -> list[Any]:
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return [model.get_input_embeddings(), model.get_output_embeddings()]
    return []


def _can_be_adapted(module: nn.Module) -> bool:
    # The classes for which peft 0.18 has a LoRA layer (tuners/lora/layer.py, dispatch_default).
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"  # GPT-2's linear layer


def _check_adapter_file(model: PreTrainedModel, options: ModelConfig, folder: Path) -> None:
    """Refuse an adapter file with missing, further or differently shaped tensors; peft would start from zeros (UserError)."""
    path, problem = folder / "adapter_model.safetensors", misfit(options, folder)
    check_readable([path])
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    base_weights = [name for name in shapes if name.endswith(".base_layer.weight")]
    if base_weights:
        # peft would replace the base's weight with it, and saving the adapter would lose it.
        raise UserError("DSR219", f"{path} holds a weight of the base model ({base_weights[0]}): remove it from the file")
    try:
        missing, unexpected = _load_shapes(model, folder, shapes)
    except KeyError as error:
        raise UserError("DSR218", f"{problem}: {path} lacks the tensor {error.args[0]}") from error
    except damaged() + (RuntimeError,) as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise UserError("DSR218", f"{problem}: {lines[0] if lines else first_line(error)}") from error
    for names, relation in ((missing, "missing from"), (unexpected, "of other layers in")):
        if names:
            count = plural(len(names), "tensor")
            raise UserError("DSR218", f"{problem}: by {CONFIG}, {count} {relation} {path} ({names[0]}, ...)")


def _load_shapes(model: PreTrainedModel, folder: Path, shapes: dict[str, list[int]]) -> tuple[list[str], list[str]]:
    """Load tensors of these shapes into the adapter on the meta device: the names that are missing, and unexpected ones."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    # Some initializations (PiSSA, LoftQ) compute with the base's weights, which are not there yet.
    config.init_lora_weights, config.inference_mode = True, False
    with torch.device("meta"), warnings.catch_warnings():
        # torch warns that nothing is copied to the meta device.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        result: Any = set_peft_model_state_dict(adapted, tensors)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    missing = [name.replace(".default", "") for name in result.missing_keys if name in trained]
    return missing, list(result.unexpected_keys)
