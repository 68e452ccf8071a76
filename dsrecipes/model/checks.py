"""Which combinations of model, flags and rows are refused before weights are loaded."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsrecipes.config.schema import ModelConfig
from dsrecipes.data.columns import first_beyond
from dsrecipes.data.provenance import RowSources
from dsrecipes.data.split import Split
from dsrecipes.errors import UserError, nearest
from dsrecipes.io.hub import first_line
from dsrecipes.model.configuration import empty_model
from dsrecipes.model.tokenizer import OTHER_TOKENIZER, beyond_embedding


def check_model(config: PretrainedConfig, options: ModelConfig, max_length: int, zero_stage: int | None) -> None:
    """Refuse combinations that would fail late or train something else without an error.

    Args:
        max_length: tokens of a sequence.
        zero_stage: None for plain PyTorch.

    Raises:
        UserError: sequences longer than the model's positions, or a pre-quantized model where it cannot be trained.
    """
    name = options.model_name_or_path
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError("DSR209", f"--max_length {max_length}: {name} has {positions} positions; give {positions} or less")
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    # A dict as config.json has it, an object once transformers has processed it.
    is_dict = isinstance(quantization, dict)
    method = quantization.get("quant_method") if is_dict else getattr(quantization, "quant_method", "")
    alternative = "take the unquantized model with --load_in_4bit true, which quantizes it while loading"
    if zero_stage == 3:
        raise UserError(
            "DSR210",
            f"model {name} is pre-quantized ({method}), which ZeRO-3 cannot shard: {alternative}, or use --deepspeed zero2",
        )
    if options.lora_r == 0:
        raise UserError(
            "DSR210",
            f"model {name} is pre-quantized ({method}) and its weights cannot be trained: give --lora_r 16, or {alternative}",
        )


def check_attention(options: ModelConfig, config: PretrainedConfig, auto_class: str) -> None:
    """Refuse an --attn_implementation that transformers cannot give this model on this machine.

    Raises:
        UserError: unknown name, missing package, or not implemented for the model.
    """
    requested = options.attn_implementation
    if requested is None:
        return
    try:
        empty_model(config, auto_class, options.trust_remote_code, attn_implementation=requested)
    except (ValueError, ImportError) as error:
        # Paged attention is for serving, and dsrecipes' own is chosen by isolate_examples.
        registered = ALL_ATTENTION_FUNCTIONS.valid_keys()
        known = ["eager", *(name for name in registered if not name.startswith(("paged", "dsrecipes")))]
        reason = first_line(error)
        if requested not in known and "is not supported" in reason:
            suggestion = nearest(requested, known)
            reason = f"transformers has no attention of this name{suggestion}; there are {', '.join(sorted(known))}"
        raise UserError("DSR212", f"--attn_implementation {requested}: {reason}") from error


def check_splits(
    splits: dict[str, Split], tokenizer: PreTrainedTokenizerBase, rows: int | None, block: int | None = None
) -> None:
    """Refuse prepared rows with a token that has no row in the embedding.

    Args:
        rows: rows of the embedding; None where they are not known.
        block: tokens of a block, as for data.provenance.

    Raises:
        UserError: names the token, its id and the first row that holds it.
    """
    if not rows:
        return
    for name, split in splits.items():
        largest = split.stats.largest_id
        # Tokenizing recorded the largest id, so most splits need no scan.
        if largest is not None and largest < rows:
            continue
        position = first_beyond(split.path, "input_ids", rows)
        if position is not None:
            row, token_id = position
            raise UserError(
                "DSR215",
                f"{beyond_embedding(tokenizer, token_id, rows)}, and the {name} rows hold it "
                f"({RowSources(split.path).describe([row], block)}): {OTHER_TOKENIZER}",
            )
