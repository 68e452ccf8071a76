"""LoRA and 4-bit loading through peft and bitsandbytes."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from dsrecipes.config.adapter import CONFIG, adapter_folder, base_model, lora_targets
from dsrecipes.config.schema import ModelConfig
from dsrecipes.errors import UserError, nearest, plural
from dsrecipes.model.load import empty_model
from dsrecipes.model.modalities import unreached_by_text
from dsrecipes.model.task import is_causal_lm
from dsrecipes.runs.weights import check_readable


def four_bit(options: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit loading (QLoRA, arXiv:2305.14314) with one dtype for computation and storage."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def add_lora(model: PreTrainedModel, options: ModelConfig, heads: list[str], keep_dtype: bool) -> PreTrainedModel:
    """Freeze the model and add adapters to all linear layers (GPT-2's Conv1D too), or to the named ones.

    Args:
        heads: modules that start from random weights; they are trained whole and saved with the adapter.
        keep_dtype: leave the adapters in the model's dtype; False makes them fp32, which plain PyTorch updates.

    Raises:
        UserError: a named layer does not exist.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if is_causal_lm(model) else None,
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=lora_targets(options.lora_target_modules),
        modules_to_save=heads or None,
        exclude_modules=_whole_modules([*heads, *unreached_by_text(model)]),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        return _saved_alone(get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype))
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        raise UserError(f"--lora_target_modules {options.lora_target_modules}: {str(error).splitlines()[0]}") from None


def load_lora(model: PreTrainedModel, options: ModelConfig, folder: Path, keep_dtype: bool) -> PreTrainedModel:
    """Load a trained adapter onto its base, to be trained further; `keep_dtype` as for add_lora.

    Raises:
        UserError: the adapter does not fit the base, or its files are damaged.
    """
    from peft import LoraConfig, PeftModel

    from dsrecipes.io.hub import damaged, first_line

    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.lora_dropout, config.inference_mode = options.lora_dropout, False
        adapted = PeftModel.from_pretrained(
            model, str(folder), config=config, is_trainable=True, autocast_adapter_dtype=not keep_dtype
        )
        return _saved_alone(adapted)
    except (*damaged(), RuntimeError) as error:
        raise UserError(f"{_misfit(options, folder)}: {first_line(error)}") from error


def _saved_alone(model: PreTrainedModel) -> PreTrainedModel:
    """Have the adapter saved without weights of the base; peft would add a frozen embedding or head that has an adapter."""
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


def _whole_modules(names: list[str]) -> str | None:
    """A pattern, as peft takes it, for these modules and everything below them."""
    return rf"(?:{'|'.join(map(re.escape, names))})(?:\..*)?" if names else None


def check_targets(options: ModelConfig, config: PretrainedConfig, auto_class: str) -> None:
    """Refuse --lora_target_modules, and an adapter folder, that do not fit the model, before weights are loaded.

    The model is built on the meta device; under ZeRO-3 this must come before TrainConfig, which would have it sharded.

    Raises:
        UserError: names the value and the layers that can be given, or the adapter's tensor that does not fit.
    """
    targets = lora_targets(options.lora_target_modules)
    folder = adapter_folder(options.model_name_or_path)
    if not options.lora_r or (targets == "all-linear" and folder is None):
        return
    model = empty_model(config, auto_class, options.trust_remote_code)
    if targets != "all-linear":
        where = "--lora_target_modules" if folder is None else f"{_misfit(options, folder)}: target_modules"
        for target in [targets] if isinstance(targets, str) else targets:
            _check_target(model, target, isinstance(targets, str), where)
    if folder is not None:
        _check_tensors(model, options, folder)


def _misfit(options: ModelConfig, folder: Path) -> str:
    return f"the adapter {folder} does not fit its base model {base_model(options.model_name_or_path or '')}"


def _check_target(model: PreTrainedModel, target: str, is_pattern: bool, where: str) -> None:
    """Refuse a name or pattern that matches no layer, or one that cannot have an adapter of its own (UserError)."""
    excluded = _whole_modules(unreached_by_text(model))
    modules = {
        name: module for name, module in model.named_modules() if not (excluded and re.fullmatch(excluded, name)) and name
    }
    matched = {
        name: module
        for name, module in modules.items()
        if (re.fullmatch(target, name) if is_pattern else name == target or name.endswith(f".{target}"))
    }
    tied = []
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        tied = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any(map(_takes_lora, matched.values())):
        layers = [name for name, module in modules.items() if _takes_lora(module) and module not in tied]
        last_names = sorted({name.rpartition(".")[2] for name in layers})
        raise UserError(
            f"{where} {target}: no layer of {type(model).__name__} that can have an adapter matches"
            f"{nearest(target, last_names)}; there are {', '.join(last_names)}"
        )
    for name, module in matched.items():
        if not _takes_lora(module):
            raise UserError(
                f"{where} {target}: it matches {name} too, a {type(module).__name__}, which cannot have an adapter: match linear "
                "layers alone, such as .*\\.(q|v)_proj"
            )
        if module in tied:
            raise UserError(
                f"{where} {target}: it matches {name}, whose weight is both the input embedding and the head of this model "
                "(tie_word_embeddings), so that an adapter of one could not be merged: leave it out"
            )


def _check_tensors(model: PreTrainedModel, options: ModelConfig, folder: Path) -> None:
    """Refuse an adapter's file that lacks tensors, has others, or other shapes; peft would start from zeros (UserError)."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    from dsrecipes.io.hub import damaged, first_line

    misfit = _misfit(options, folder)
    path = folder / "adapter_model.safetensors"
    check_readable([path])
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    base_weights = [name for name in shapes if name.endswith(".base_layer.weight")]
    if base_weights:  # peft would replace the base's weight by it, and saving the adapter would lose it
        raise UserError(f"{path} holds a weight of the base model ({base_weights[0]}): remove it from the file")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.init_lora_weights, config.inference_mode = True, False  # some ways to start need the weights
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied to the meta device
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
            tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
            result = set_peft_model_state_dict(adapted, tensors)
    except KeyError as error:
        raise UserError(f"{misfit}: {path} lacks the tensor {error.args[0]}") from error
    except (*damaged(), RuntimeError) as error:
        mismatch = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), first_line(error))
        raise UserError(f"{misfit}: {mismatch}") from error
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    missing = [name.replace(".default", "") for name in result.missing_keys if name in trained]
    for names, words in ((missing, "missing from"), (result.unexpected_keys, "of other layers in")):
        if names:
            raise UserError(f"{misfit}: by {CONFIG}, {plural(len(names), 'tensor')} {words} {path} ({names[0]}, ...)")


def _takes_lora(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"
