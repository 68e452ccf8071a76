"""Which models are built once on this machine and cached: seeded random weights, and converted ones."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from dsrecipes.io.paths import cache_root

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def cached_folder(name: str) -> Path:
    """Folder of a cached model; it exists once `build_once` has finished."""
    return cache_root() / "models" / name


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build a model folder unless it exists; concurrent processes wait for the first one.

    Args:
        folder: final folder, inside the cache.
        build: writes config.json and weights into the folder that it is given.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            # Built under another name and renamed, so that a killed process leaves no half-written model behind.
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            build(partial)
            partial.rename(folder)
    return folder


def save_on_this_rank(model: PreTrainedModel, folder: Path) -> None:
    """Save a model from whichever rank calls.

    Where a process group exists, save_pretrained of transformers 5.23 writes weights on rank 0 only.
    """
    model.should_save_on_this_rank = lambda is_main_process: is_main_process  # type: ignore[method-assign]
    model.save_pretrained(folder)


def random_weights(config: PretrainedConfig, auto_class: str, seed: int) -> str:
    """Folder with seeded random weights for a configuration, built once and cached.

    Every rank and ZeRO stage then loads the same numbers; weights initialized under ZeRO-3 would differ. The first call
    must precede TrainConfig: with ZeRO-3 active, initialization is a collective, and the lock would block all ranks but one.
    """
    import torch
    import transformers

    from dsrecipes.model.task import loading_class

    # Initialization may change between releases of both libraries, so their versions are part of the name.
    text = f"{config.to_json_string()} {auto_class} {seed} {transformers.__version__} {torch.__version__}"

    def build(folder: Path) -> None:
        transformers.set_seed(seed)
        model = loading_class(auto_class, config).from_config(copy.deepcopy(config), dtype=torch.float32)
        save_on_this_rank(model, folder)

    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return str(build_once(cached_folder(f"random-{digest}"), build))
