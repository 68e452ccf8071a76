"""Configuration, tokenizer and weights, checked before anything is downloaded or sharded."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto

from dsrecipes.config.adapter import CONFIG as ADAPTER_CONFIG
from dsrecipes.config.adapter import adapter_folder, base_model, read_head
from dsrecipes.config.schema import ModelConfig
from dsrecipes.data.columns import first_beyond
from dsrecipes.data.provenance import RowSources
from dsrecipes.data.split import Split
from dsrecipes.errors import UserError, nearest, plural
from dsrecipes.io.hub import damaged, first_line, hub_error
from dsrecipes.io.paths import cache_root, starter_path
from dsrecipes.model.bundled import carrier_hint, local_model, read_tokenizer, save_here
from dsrecipes.model.modalities import parameters_below, unreached_by_text
from dsrecipes.model.task import class_names, loading_class, takes_text
from dsrecipes.runs.weights import check_readable, indexed_files, loaded_files

_TASKS = {
    "AutoModelForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "a causal language model", True),
    "AutoModelForMultipleChoice": ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "an encoder for multiple choice", False),
    "AutoModelForSequenceClassification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "a classifier", False),
}
"""Auto class -> (its table in transformers, the task in words, whether the weights must already have this head)."""

_PICKLES = (
    "model {} has its weights as pickles (.bin) alone, a format that can carry code: take a version with .safetensors, or "
    "give --allow_pickle true if you trust it"
)

_OTHER_TOKENIZER = "take the tokenizer that belongs to this model, or a model whose embedding was resized for it"


def _source(options: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Where the weights are (for an adapter folder: those of its base), and the other arguments of from_pretrained."""
    model = options.model_name_or_path or ""
    try:
        name = local_model(starter_path(base_model(model)))
    except UserError as error:
        if adapter_folder(model) is None:
            raise
        why = str(error).removeprefix("--model_name_or_path ")
        raise UserError(f"the adapter {model} needs its base model, which its {ADAPTER_CONFIG} names: {why}") from error
    return name, {"revision": options.model_revision, "trust_remote_code": options.trust_remote_code}


def _explain(error: Exception, options: ModelConfig) -> UserError:
    name, adapter = base_model(options.model_name_or_path or ""), adapter_folder(options.model_name_or_path)
    local = carrier_hint(name)
    if adapter is not None:
        local = f"a local copy, and write its path into {adapter / ADAPTER_CONFIG} (base_model_name_or_path)"
    message = hub_error(error, name, "model", local)
    if message is None and "trust_remote_code" in str(error):
        message = f"model {name} comes with Python code of its own: read it, then give --trust_remote_code true to run it"
    if message is None and "use_safetensors" in str(error):
        message = _PICKLES.format(name)
    message = message or f"model {name} cannot be loaded: {first_line(error)}"
    if adapter is not None:
        message = f"the adapter {adapter} needs its base model, which its {ADAPTER_CONFIG} names: {message}"
    return UserError(message)


def _refuse_pickles(name: str, options: ModelConfig) -> None:
    """Weights in a folder must be safetensors, in files of that folder, unless pickles are allowed (UserError)."""
    folder = Path(name)
    if any(folder.glob("model*.safetensors*")):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            indexed_files(index)
    elif any(folder.glob("*.bin*")) and not options.allow_pickle:
        raise UserError(_PICKLES.format(options.model_name_or_path))


def load_config(options: ModelConfig, auto_class: str) -> PretrainedConfig:
    """The model's configuration, refused where the recipe cannot train it.

    Raises:
        UserError: nothing of this name, not reachable, for another task, or its weights cannot be read.
    """
    name, where = _source(options)
    if not options.from_scratch:
        folders = [Path(name), adapter_folder(options.model_name_or_path)]
        check_readable([path for folder in folders if folder and folder.is_dir() for path in loaded_files(folder)])
    try:
        _refuse_odd_numbers(PretrainedConfig.get_config_dict(name, revision=options.model_revision)[0])
        config = AutoConfig.from_pretrained(name, **where)
    except damaged() as error:
        raise _explain(error, options) from error
    folder = adapter_folder(options.model_name_or_path)
    if folder is not None:
        read_head(folder, config)
    table, task, same_head = _TASKS.get(auto_class, ("", "", False))
    if not table:
        return config
    made_for = config.architectures or []
    fits = config.model_type in getattr(modeling_auto, table) or hasattr(config, "auto_map")
    if fits and same_head and made_for and not options.from_scratch:
        fits = bool(class_names(table) & set(made_for)) or hasattr(config, "auto_map")
    fits = fits or (auto_class == "AutoModelForCausalLM" and takes_text(config))
    if not fits:
        raise UserError(
            f"model {options.model_name_or_path} is a {', '.join(made_for) or config.model_type}; this recipe trains {task}"
        )
    return config


_NUMBERS = re.compile(r"(?:.*_)?(?:(layers?|blocks)|labels|heads?|experts|size|dim|embd)")
_MOST_LAYERS, _MOST_PARTS = 2000, 10_000_000


def _refuse_odd_numbers(config: dict[str, Any]) -> None:
    """Refuse sizes that transformers would count up to for hours, or take for a fault of torch's (ValueError)."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_odd_numbers(value)
        elif (found := _NUMBERS.fullmatch(str(key))) and isinstance(value, int):
            most = _MOST_LAYERS if found[1] else _MOST_PARTS
            if not -1 <= value <= most:  # some write -1 for none
                raise ValueError(f"{key} is {value} in its config.json, which is no number from 0 to {most:,}")


def check_model(config: PretrainedConfig, options: ModelConfig, max_length: int, zero_stage: int | None) -> None:
    """Combinations that fail later, or in silence.

    Raises:
        UserError: more positions than the model has, or a pre-quantized model where it cannot be trained.
    """
    name = options.model_name_or_path
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"--max_length {max_length}: {name} has {positions} positions; give {positions} or less")
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", "")
    alternative = "take the unquantized model with --load_in_4bit true, which quantizes it while loading"
    if zero_stage == 3:
        raise UserError(
            f"model {name} is pre-quantized ({method}), which ZeRO-3 cannot divide: {alternative}, or use --deepspeed zero2"
        )
    if options.lora_r == 0:
        raise UserError(
            f"model {name} is pre-quantized ({method}) and its weights cannot be trained: give --lora_r 16, or {alternative}"
        )


def check_attention(options: ModelConfig, config: PretrainedConfig, auto_class: str) -> None:
    """Refuse an --attn_implementation that transformers cannot give this model here, before weights are loaded.

    Raises:
        UserError: there is none of this name, its package is missing, or the model does not have it.
    """
    asked = options.attn_implementation
    if asked is None:
        return
    try:
        empty_model(config, auto_class, options.trust_remote_code, attn_implementation=asked)
    except (ValueError, ImportError) as error:
        known = [
            "eager",
            *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if not key.startswith(("paged", "dsrecipes"))),
        ]
        reason = first_line(error)
        if asked not in known and "is not supported" in reason:
            reason = (
                f"transformers has no attention of this name{nearest(asked, known)}; there are {', '.join(sorted(known))}"
            )
        raise UserError(f"--attn_implementation {asked}: {reason}") from error


def empty_model(config: PretrainedConfig, auto_class: str, trust: bool, **options: Any) -> PreTrainedModel:
    """The model on the meta device, without weights; under ZeRO-3 this must come before TrainConfig, which would shard it."""
    with torch.device("meta"):
        return loading_class(auto_class, config).from_config(copy.deepcopy(config), trust_remote_code=trust, **options)


def load_tokenizer(options: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        UserError: the folder or hub repository has none that loads.
    """
    name, where = _source(options)
    folder = adapter_folder(options.model_name_or_path)
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        name = str(folder)
    missing = UserError(f"model {name} has no tokenizer: add its tokenizer.json and tokenizer_config.json")
    try:
        tokenizer = read_tokenizer(name, **where)
    except Exception as error:
        if "Couldn't instantiate the backend tokenizer" in str(error):
            raise missing from error
        raise UserError(f"no tokenizer: {_explain(error, options)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise missing  # transformers makes an empty one, which reads every word as unknown, for BERT and GPT-2
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> str | None:
    """Refuse a tokenizer whose ids lie beyond the embedding, except for padding, which gets another id.

    Returns:
        A note on the new padding token, for the header; None where it is unchanged.

    Raises:
        UserError: the tokenizer is another model's, or its end token has no row in the embedding.
    """
    rows = embedding_rows(config)
    if rows and tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has {tokenizer.vocab_size} tokens, the model has {rows}: "
            "they do not belong together; take the tokenizer files of this very model"
        )
    if rows and (tokenizer.eos_token_id or 0) >= rows:
        raise UserError(
            f"{beyond_embedding(tokenizer, tokenizer.eos_token_id, rows)}, and it is the end token (eos_token): "
            f"{_OTHER_TOKENIZER}"
        )
    if not rows or (tokenizer.pad_token_id or 0) < rows:
        return None
    old, number = tokenizer.pad_token, tokenizer.pad_token_id
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return (
        f"padding token {old!r} (id {number}) has no row in the embedding ({rows} rows): {tokenizer.pad_token!r} "
        f"(id {tokenizer.pad_token_id}) pads instead"
    )


def embedding_rows(config: PretrainedConfig) -> int | None:
    """Rows of the input embedding; None where the configuration does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def beyond_embedding(tokenizer: PreTrainedTokenizerBase, number: int, rows: int) -> str:
    """Describe a token that the model has no row for."""
    token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    return f"token {token!r} has id {number}, but the model's embedding has {rows} rows (ids 0 to {rows - 1})"


def check_ids(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Refuse token ids that the embedding has no row for (ValueError); on a GPU they would end in a device assert."""
    largest = max(ids, default=0)
    if rows and largest >= rows:
        raise ValueError(f"{beyond_embedding(tokenizer, largest, rows)}: {_OTHER_TOKENIZER}")


def check_prompt_ids(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """check_ids for a text that the user typed: it raises UserError."""
    try:
        check_ids(ids, tokenizer, rows)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_splits(
    splits: dict[str, Split], tokenizer: PreTrainedTokenizerBase, rows: int | None, block: int | None = None
) -> None:
    """Refuse prepared rows with a token that the embedding has no row for; `block` as for origin.places.

    Raises:
        UserError: names the token, its id and the first row that holds it.
    """
    for name, split in splits.items():
        largest = split.stats.largest_id
        beyond = first_beyond(split.path, "input_ids", rows) if rows and (largest is None or largest >= rows) else None
        if beyond is not None:
            row, number = beyond
            raise UserError(
                f"{beyond_embedding(tokenizer, number, rows)}, and the {name} rows hold it ({RowSources(split.path).describe([row], block)}): "
                f"{_OTHER_TOKENIZER}"
            )


def random_weights(options: ModelConfig, config: PretrainedConfig, auto_class: str, seed: int) -> str:
    """A folder with the configuration's seeded random weights, made once in the cache.

    Every rank and ZeRO stage then loads the same numbers; drawn under ZeRO-3 they would be others. The first call
    must come before TrainConfig: with ZeRO-3 on, drawing takes all ranks, and one of them waits for the lock.
    """
    text = f"{config.to_json_string()} {auto_class} {seed} {transformers.__version__} {torch.__version__}"
    folder = cache_root() / "models" / f"random-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            scratch = folder.with_suffix(".partial")
            shutil.rmtree(scratch, ignore_errors=True)
            set_seed(seed)
            model = loading_class(auto_class, config).from_config(copy.deepcopy(config), dtype=torch.float32)
            save_here(model, scratch)
            scratch.rename(folder)
    return str(folder)


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
    """The weights, in 4 bits and with LoRA where asked, ready for Trainer.

    Under ZeRO-3 (a TrainConfig with that stage is alive) the weights are divided as they are read.

    Args:
        dtype: of the weights; in 4 bits of the computation and the storage too, so that ZeRO-3 finds one dtype.
        seed: for whatever starts at random: a new head, an adapter.
        deepspeed: whether DeepSpeed will hold the weights, and keep fp32 copies of those it trains.
        adapter: whether a LoRA run's model gets its new adapter; False for the base alone.
        device: where 4-bit weights are quantized; transformers takes the current GPU where it is not given.
    """
    name, where = _source(options)
    if options.from_scratch:
        name = random_weights(options, config, auto_class, seed)
    quantization = {}
    if options.load_in_4bit:
        from dsrecipes.model.lora import four_bit

        quantization = {"quantization_config": four_bit(options, dtype)}
        if device is not None:
            quantization["device_map"] = {"": device}
    same_head = _TASKS.get(auto_class, ("", "", False))[2]
    _refuse_pickles(name, options)
    set_seed(seed)
    try:
        model, info = loading_class(auto_class, config).from_pretrained(
            name, **where, config=config, dtype=dtype, attn_implementation=options.attn_implementation,
            output_loading_info=True, ignore_mismatched_sizes=not same_head,
            use_safetensors=None if options.allow_pickle else True, **quantization,
        )  # fmt: skip
    except damaged() as error:
        raise _explain(error, options) from error
    except RuntimeError as error:
        if "negative dimension" in str(error):
            raise _explain(error, options) from error
        if "mismatched" not in str(error):
            raise
        raise UserError(f"model {name}: the weights have other shapes than its config.json says") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # of a hub repository that holds both; see local_model for folders
        raise UserError(f"model {name} holds a model and a LoRA adapter ({ADAPTER_CONFIG}): give a folder with one of them")
    _forget_unused_renames(model)
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    _refuse_holes(missing, model, name, same_head)
    _draw_new_weights(model, missing, config, seed)
    for parameter in parameters_below(model, unreached_by_text(model)):
        parameter.requires_grad_(False)
    if options.lora_r and adapter:
        from dsrecipes.model.lora import add_lora, load_lora

        set_seed(seed)
        folder = adapter_folder(options.model_name_or_path)
        heads = _outermost({key.rpartition(".")[0] for key in missing} | _classification_head(model, auto_class))
        if folder is None:
            model = add_lora(model, options, heads, keep_dtype=deepspeed)
        else:
            model = load_lora(model, options, folder, keep_dtype=deepspeed)
    disable_cpu_packing(model)
    return model


def _outermost(names: set[str]) -> list[str]:
    """Names of layers without those below another of them."""
    return sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def _classification_head(model: PreTrainedModel, auto_class: str) -> set[str]:
    """The layers of a classifier behind its body: trained whole beside an adapter, also where the checkpoint has them."""
    if not auto_class.endswith("ForSequenceClassification"):
        return set()
    layers = model.named_children()
    return {name for name, layer in layers if name != model.base_model_prefix and next(layer.parameters(), None) is not None}


def _forget_unused_renames(model: PreTrainedModel) -> None:
    """Let a model that was loaded under ZeRO-3 be saved under the names of its checkpoint.

    transformers 5.23 keeps every renaming rule there, also those that matched nothing, and saving would apply them
    backwards (`language_model.model.model.layers`); without ZeRO-3 it drops them itself.
    """
    from transformers.core_model_loading import WeightRenaming

    rules = getattr(model, "_weight_conversions", None)
    if rules:
        model._weight_conversions = [rule for rule in rules if not isinstance(rule, WeightRenaming) or rule.was_used()]


def _refuse_holes(missing: list[str], model: PreTrainedModel, name: str, same_head: bool) -> None:
    """Refuse weights that lack more than a new head (UserError); transformers would draw them at random in silence."""
    body = f"{model.base_model_prefix}."
    holes = [key for key in missing if same_head or (key.startswith(body) and "pooler" not in key)]
    if holes:
        raise UserError(
            f"model {name}: {plural(len(holes), 'weight')} missing from its files or of another shape ({holes[0]}, ...); they are "
            "damaged or incomplete"
        )


def _draw_new_weights(model: nn.Module, missing: list[str], config: PretrainedConfig, seed: int) -> None:
    """Draw a head that the checkpoint lacks from its own generator: the same numbers at every ZeRO stage."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for name in [key for key in missing if key in parameters]:
        parameter = parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        fresh = torch.zeros(shape)
        if len(shape) > 1:
            fresh.normal_(0.0, getattr(config, "initializer_range", 0.02), generator=generator)
        elif name.endswith("weight"):
            fresh.fill_(1.0)
        if is_deepspeed_zero3_enabled():
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    parameter.data.copy_(fresh)
        else:
            parameter.data.copy_(fresh)


def disable_cpu_packing(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that was trained, on every CPU.

    On a CPU with AVX-512 BF16, bitsandbytes (0.50.2, nn/modules.py, Linear4bit.forward) repacks a weight at its first
    forward pass in evaluation mode and computes it in bf16 from then on. ZeRO-3 cannot shard the repacked weight, a
    checkpoint cannot hold it, and the logits differ from those of training and of other CPUs.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def ready(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device and into evaluation mode, where it computes as in training."""
    disable_cpu_packing(model)
    return model.to(device).eval()
