"""Fine-tuning recipes on Hugging Face Trainer and DeepSpeed.

from dsrecipes import load_recipe
load_recipe("gpt2_clm", max_steps=10).run()
"""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
if not (_HERE / "recipes").is_dir():
    # A checkout keeps recipes/ and ds_configs/ at its top; setup.cfg maps them into the package only when installed.
    __path__.append(str(_HERE.parent))

# On a CPU with AVX-512 BF16 bitsandbytes warns at import that it lacks a kernel from the hub, which nothing here uses:
# see dsrecipes.model.quantization.disable_cpu_packing. transformers may import it before dsrecipes.model is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_EXPORTS = {
    "load_recipe": "base",
    "RecipeBase": "base",
    "UserError": "errors",
    "chat": "inference.chat",
    "generate": "inference.generate",
    "evaluate": "evaluation.evaluate",
    "compare": "evaluation.compare",
    "judge": "evaluation.judge",
    "verify": "publish.verify",
    "export": "publish.export",
    "report": "reporting.report",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `dsrecipes list` and `show` must not wait for torch."""
    if name in _EXPORTS:
        return getattr(import_module(f"dsrecipes.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'dsrecipes' has no attribute {name!r}")
