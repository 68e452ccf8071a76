"""How the training libraries are imported without what the run does not need."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsrecipes.config.layers import Layers

_QUANTIZED_OPTIMIZERS = ("8bit", "bnb", "paged")


def unneeded_packages(layers: Layers) -> list[str]:
    """Packages that transformers imports wherever they are installed, and that this process does not use."""
    if Path(sys.argv[0]).name not in ("dsrecipes", "run.py"):
        # not our own command: what runs later in this process may need them
        return []
    values = {key: str(value) for key, (value, _) in layers.merged().items()}
    if not str(layers.recipe.module).startswith("dsrecipes.recipes."):
        # a user's own recipe may give Trainer a Dataset, or a model an adapter
        return ["scipy"]
    optimizer = values.get("optim", "")
    needs_bitsandbytes = any(part in optimizer for part in _QUANTIZED_OPTIMIZERS)
    if values.get("lora_r", "0") == "0" and not needs_bitsandbytes:
        return ["scipy", "datasets", "peft", "bitsandbytes"]
    return ["scipy", "datasets"]


def _scan_models_once() -> None:
    """Let transformers scan its model files once instead of twice during its import: half a second.

    transformers 5.23 scans models/ and then models/__init__.py, with equal results, and caches them by path.
    """
    from transformers.utils import import_utils

    scan: Any = getattr(import_utils, "create_import_structure_from_path", None)
    # the cache of 5.23; another version may have another function
    if hasattr(scan, "cache_info"):

        def scan_once(path: str | Path) -> object:
            return scan(Path(path).parent if Path(path).name == "__init__.py" else Path(path))

        setattr(import_utils, "create_import_structure_from_path", scan_once)  # noqa: B010 (typed as the cached function)


@contextlib.contextmanager
def hide_packages(packages: list[str]) -> Iterator[None]:
    """Make packages appear not installed for the duration of a block."""
    # None in sys.modules makes an import raise ModuleNotFoundError
    modules: dict[str, Any] = sys.modules
    names = [name for name in packages if name not in modules]
    modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del modules[name]


@contextlib.contextmanager
def quick_imports(unneeded: list[str]) -> Iterator[None]:
    """Import without unneeded packages, and without garbage collection, which finds nothing to free.

    Both took a third of the time to the first step.
    """
    gc.disable()
    try:
        with hide_packages(unneeded):
            _scan_models_once()
            yield
    finally:
        # what was imported stays for good, so later collections need not go through it
        gc.freeze()
        gc.enable()
