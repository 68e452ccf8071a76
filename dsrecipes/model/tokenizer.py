"""Which tokenizer a model has, and whether the model has an embedding for each of its ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from dsrecipes.config.adapter import adapter_folder
from dsrecipes.config.schema import ModelConfig
from dsrecipes.errors import UserError
from dsrecipes.model.weights_source import explain_load_error, weights_source

OTHER_TOKENIZER = "take the tokenizer that belongs to this model, or a model whose embedding was resized for it"


def read_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer and encode a text once: a setting of the wrong type raises only then.

    Raises:
        Exception: tokenizers raises no narrower one for a damaged tokenizer.json.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer(["a b"])
    return tokenizer


def load_tokenizer(options: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer, or the one saved with an adapter.

    Raises:
        UserError: the folder or hub repository has none that loads.
    """
    name, from_options = weights_source(options)
    adapter = adapter_folder(options.model_name_or_path)
    # A run may have added a chat template or tokens to the base's tokenizer.
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        name = str(adapter)
    missing = UserError("DSR213", f"model {name} has no tokenizer: add its tokenizer.json and tokenizer_config.json")
    try:
        tokenizer = read_tokenizer(name, **from_options)
    except Exception as error:
        if "Couldn't instantiate the backend tokenizer" in str(error):
            raise missing from error
        raise explain_load_error(error, options).at("no tokenizer") from error
    # For BERT and GPT-2, transformers makes up an empty tokenizer that reads every word as unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise missing
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> str | None:
    """Refuse a tokenizer whose ids exceed the embedding; a padding token that does is replaced.

    Returns:
        A note on the new padding token, for the header; None where it is unchanged.

    Raises:
        UserError: the tokenizer belongs to another model, or its end token has no row in the embedding.
    """
    rows = embedding_rows(config)
    if not rows:
        return None
    if tokenizer.vocab_size > rows:
        raise UserError(
            "DSR214",
            f"the tokenizer of {tokenizer.name_or_path} has {tokenizer.vocab_size} tokens, the model has {rows}: "
            "they do not belong together; take the tokenizer files of this very model",
        )
    end_id = tokenizer.eos_token_id or 0
    if end_id >= rows:
        problem = beyond_embedding(tokenizer, end_id, rows)
        raise UserError("DSR214", f"{problem}, and it is the end token (eos_token): {OTHER_TOKENIZER}")
    # Padding is masked, so any id with a row in the embedding will do; other special tokens would be trained on.
    if (tokenizer.pad_token_id or 0) < rows:
        return None
    old_token, old_id = tokenizer.pad_token, tokenizer.pad_token_id
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return (
        f"padding token {old_token!r} (id {old_id}) has no row in the embedding ({rows} rows): {tokenizer.pad_token!r} "
        f"(id {tokenizer.pad_token_id}) pads instead"
    )


def embedding_rows(config: PretrainedConfig) -> int | None:
    """Rows of the input embedding; None where the configuration does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def beyond_embedding(tokenizer: PreTrainedTokenizerBase, token_id: int, rows: int) -> str:
    """Describe a token that has no row in the model's embedding."""
    token = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
    return f"token {token!r} has id {token_id}, but the model's embedding has {rows} rows (ids 0 to {rows - 1})"


def check_ids(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Refuse token ids without a row in the embedding (ValueError); on a GPU they would end in a device-side assert."""
    largest = max(ids, default=0)
    if rows and largest >= rows:
        raise ValueError(f"{beyond_embedding(tokenizer, largest, rows)}: {OTHER_TOKENIZER}")


def check_prompt_ids(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Run check_ids on a text that the user typed (UserError instead of ValueError)."""
    try:
        check_ids(ids, tokenizer, rows)
    except ValueError as error:
        raise UserError("DSR215", str(error)) from error
