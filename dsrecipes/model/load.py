"""How weights are loaded: in which dtype, quantized or not, with a new head, with an adapter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, set_seed

from dsrecipes.config.adapter import CONFIG as ADAPTER_CONFIG
from dsrecipes.config.adapter import adapter_folder
from dsrecipes.config.schema import ModelConfig
from dsrecipes.errors import UserError
from dsrecipes.io.hub import damaged
from dsrecipes.model.cached_models import random_weights
from dsrecipes.model.configuration import needs_trained_head
from dsrecipes.model.modalities import parameters_below, unreached_by_text
from dsrecipes.model.new_head import head_layers, initialize_head, refuse_missing_weights
from dsrecipes.model.quantization import disable_cpu_packing, four_bit_config
from dsrecipes.model.task import loading_class
from dsrecipes.model.weights_source import explain_load_error, refuse_pickles, weights_source


def load_model(
    options: ModelConfig,
    config: PretrainedConfig,
    auto_class: str,
    dtype: torch.dtype,
    seed: int,
    deepspeed: bool,
    adapter: bool = True,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load the weights, in 4 bits and with LoRA where requested, ready for Trainer.

    Under ZeRO-3 (a TrainConfig with that stage is alive) the weights are sharded while they are read.

    Args:
        dtype: of the weights; in 4 bits also of the computation and the storage, so that ZeRO-3 finds one dtype.
        seed: for whatever starts from random values: a new head, an adapter.
        deepspeed: whether DeepSpeed will own the weights, and keep fp32 copies of those it trains.
        adapter: whether a LoRA run's model gets its adapter; False for the base alone.
        device: where 4-bit weights are quantized; None: the current GPU, as transformers chooses.

    Raises:
        UserError: the weights cannot be loaded, are incomplete, or do not fit the configuration.
    """
    name, from_options = weights_source(options)
    if options.from_scratch:
        name = random_weights(config, auto_class, seed)
    refuse_pickles(name, options)
    if options.load_in_4bit:
        from_options["quantization_config"] = four_bit_config(options, dtype)
        if device is not None:
            from_options["device_map"] = {"": device}
    # from_pretrained initializes missing layers at random, before initialize_head replaces them.
    set_seed(seed)
    model, missing = _from_pretrained(name, options, config, auto_class, dtype, from_options)
    refuse_missing_weights(missing, model, name, needs_trained_head(auto_class))
    initialize_head(model, missing, config, seed)
    # Text gives these parameters no gradient, which DDP would wait for in every step.
    for parameter in parameters_below(model, unreached_by_text(model)):
        parameter.requires_grad_(False)
    if options.lora_r and adapter:
        model = _with_adapter(model, options, head_layers(model, missing, auto_class), deepspeed, seed)
    disable_cpu_packing(model)
    return model


def _from_pretrained(
    name: str,
    options: ModelConfig,
    config: PretrainedConfig,
    auto_class: str,
    dtype: torch.dtype,
    from_options: dict[str, Any],
) -> tuple[PreTrainedModel, list[str]]:
    """The loaded model, and the sorted names of parameters that its files lack or have in another shape."""
    try:
        model, info = loading_class(auto_class, config).from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            output_loading_info=True,
            # A classifier with another number of classes gets a new head instead of an error.
            ignore_mismatched_sizes=not needs_trained_head(auto_class),
            # True: never a pickle, which can carry code.
            use_safetensors=None if options.allow_pickle else True,
            **from_options,
        )
    except damaged() as error:
        raise explain_load_error(error, options) from error
    except RuntimeError as error:
        if "negative dimension" in str(error):
            raise explain_load_error(error, options) from error
        if "mismatched" not in str(error):
            raise
        raise UserError("DSR216", f"model {name}: the weights have other shapes than its config.json says") from error
    # Set for a hub repository that holds both; local_model refuses folders that do.
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "DSR201", f"model {name} holds a model and a LoRA adapter ({ADAPTER_CONFIG}): give a folder with one of them"
        )
    _drop_unused_renamings(model)
    return model, sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})


def _with_adapter(
    model: PreTrainedModel, options: ModelConfig, heads: list[str], deepspeed: bool, seed: int
) -> PreTrainedModel:
    # peft takes seconds to import, and few runs need it.
    from dsrecipes.model.lora import add_lora, load_lora

    set_seed(seed)
    folder = adapter_folder(options.model_name_or_path)
    if folder is None:
        return add_lora(model, options, heads, keep_dtype=deepspeed)
    return load_lora(model, options, folder, keep_dtype=deepspeed)


def _drop_unused_renamings(model: PreTrainedModel) -> None:
    """Let a model that was loaded under ZeRO-3 be saved under the names of its checkpoint.

    Under ZeRO-3, transformers 5.23 keeps every renaming rule, also those that matched nothing, and saving applies them in
    reverse (`language_model.model.model.layers`); without ZeRO-3 it drops them itself.
    """
    from transformers.core_model_loading import WeightRenaming

    rules: list[Any] | None = getattr(model, "_weight_conversions", None)
    if rules:
        used = [rule for rule in rules if not isinstance(rule, WeightRenaming) or rule.was_used()]
        setattr(model, "_weight_conversions", used)  # noqa: B010 (torch types every attribute as a tensor)


def prepare_for_inference(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device and into evaluation mode, with the same kernels as in training."""
    disable_cpu_packing(model)
    model.to(device)  # type: ignore[arg-type]  # PreTrainedModel.to lost its signature behind a decorator
    return model.eval()
