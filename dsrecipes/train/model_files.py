"""What does a saved model hold beside what save_pretrained writes, and what does it leave out?"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME

from dsrecipes.config.adapter import CONFIG, HEAD, head_settings
from dsrecipes.model.task import unwrapped


@contextlib.contextmanager
def saved_as_pretrained(model: PreTrainedModel, folder: Path, state_dict: dict | None) -> Iterator[None]:
    """Save a model inside; it then loads like any Hugging Face model.

    training_args.bin is left out, because it is a pickle. Generation gets its cache back, which training turned off. Tied
    weights, which ZeRO-3 gathers separately, are made one tensor again and so written once, as by every other stage. An
    adapter of a classifier gets a file with the settings of its head.
    """
    # before save_pretrained, which recognizes tied weights by their memory
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        if state_dict and tied in state_dict and source in state_dict:
            state_dict[tied] = state_dict[source]
    config: Any = model.config
    use_cache = getattr(config, "use_cache", None)
    if use_cache is not None:
        config.use_cache = True
    try:
        yield
        # an adapter's folder has no config.json, which would record the number of classes and their names
        is_classifier = type(unwrapped(model)).__name__.endswith("ForSequenceClassification")
        if is_classifier and (folder / CONFIG).is_file():
            settings = json.dumps(head_settings(unwrapped(model).config), ensure_ascii=False, indent=1)
            (folder / HEAD).write_text(settings + "\n", encoding="utf-8")
    finally:
        if use_cache is not None:
            config.use_cache = use_cache
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
