"""Import the training libraries without what the run does not need."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

from dsrecipes.config.layers import Layers


def unneeded_packages(layers: Layers) -> list[str]:
    """Packages that transformers imports wherever it finds them, and that this process has no use for."""
    if Path(sys.argv[0]).name not in ("dsrecipes", "run.py"):
        return []  # not our own command: what follows in this process may need them
    values = {key: str(value) for key, (value, _) in layers.merged().items()}
    if not str(layers.recipe.module).startswith("dsrecipes.recipes."):
        return ["scipy"]  # a recipe of the user's own may give Trainer a Dataset, or a model an adapter
    if values.get("lora_r", "0") == "0" and not any(word in values.get("optim", "") for word in ("8bit", "bnb", "paged")):
        return ["scipy", "datasets", "peft", "bitsandbytes"]
    return ["scipy", "datasets"]


def _read_models_once() -> None:
    """Let transformers keep the names in its model files, which it reads twice when it is imported: half a second."""
    from transformers.utils import import_utils

    read = getattr(import_utils, "create_import_structure_from_path", None)
    if hasattr(read, "cache_info"):  # 5.23: cached by path; first models/, then models/__init__.py, with equal results

        def read_once(path: str | Path) -> object:
            return read(Path(path).parent if Path(path).name == "__init__.py" else Path(path))

        import_utils.create_import_structure_from_path = read_once


@contextlib.contextmanager
def hide_packages(packages: list[str]) -> Iterator[None]:
    """Let packages seem not installed for a while."""
    names = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextlib.contextmanager
def quick_imports(unneeded: list[str]) -> Iterator[None]:
    """Import without what is not needed, and without garbage collection: it finds nothing to free.

    Both took a third of the time to the first step.
    """
    gc.disable()
    try:
        with hide_packages(unneeded):
            _read_models_once()
            yield
    finally:
        gc.freeze()
        gc.enable()
