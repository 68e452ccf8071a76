"""Which names does a user of the library import? All of them from here.

from dsrecipes import load_recipe
load_recipe("gpt2_clm", max_steps=10).run()
"""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent
if not (_HERE / "recipes").is_dir():
    # A checkout keeps recipes/ and ds_configs/ at its top; setup.cfg maps them into the package only when installed.
    __path__.append(str(_HERE.parent))

# On a CPU with AVX-512 BF16 bitsandbytes warns at import that it lacks a kernel from the hub, which nothing here uses:
# see dsrecipes.model.quantization.disable_cpu_packing. transformers may import it before dsrecipes.model is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_EXPORTS = {
    # a run
    "load_recipe": "recipe_class",
    "RunResult": "base",
    "UserError": "errors",
    # a recipe of one's own
    "RecipeBase": "base",
    "Metrics": "base",
    "Row": "data.row",
    "EncodeOptions": "config.encoding",
    "Segments": "data.encode",
    "encode_segments": "data.encode",
    "encode_texts": "data.encode",
    "encode_chats": "data.chat",
    "text_field": "data.fields",
    "text_record": "data.parse",
    "instruction_record": "data.parse",
    "row_weight": "data.weights",
    "row_weights": "data.weights",
    "Split": "data.split",
    "MixedSplit": "data.sources",
    "SourceRows": "data.sources",
    # the commands
    "chat": "inference.chat",
    "generate": "inference.generate",
    "evaluate": "evaluation.evaluate",
    "compare": "evaluation.compare",
    "judge": "evaluation.judge",
    "verify": "publish.verify",
    "export": "publish.export",
    "report": "reporting.report",
}
"""Public name -> the module that defines it; the block below says the same to type checkers."""

if TYPE_CHECKING:
    from dsrecipes.base import Metrics as Metrics
    from dsrecipes.base import RecipeBase as RecipeBase
    from dsrecipes.base import RunResult as RunResult
    from dsrecipes.config.encoding import EncodeOptions as EncodeOptions
    from dsrecipes.data.chat import encode_chats as encode_chats
    from dsrecipes.data.encode import Segments as Segments
    from dsrecipes.data.encode import encode_segments as encode_segments
    from dsrecipes.data.encode import encode_texts as encode_texts
    from dsrecipes.data.fields import text_field as text_field
    from dsrecipes.data.parse import instruction_record as instruction_record
    from dsrecipes.data.parse import text_record as text_record
    from dsrecipes.data.row import Row as Row
    from dsrecipes.data.sources import MixedSplit as MixedSplit
    from dsrecipes.data.sources import SourceRows as SourceRows
    from dsrecipes.data.split import Split as Split
    from dsrecipes.data.weights import row_weight as row_weight
    from dsrecipes.data.weights import row_weights as row_weights
    from dsrecipes.errors import UserError as UserError
    from dsrecipes.evaluation.compare import compare as compare
    from dsrecipes.evaluation.evaluate import evaluate as evaluate
    from dsrecipes.evaluation.judge import judge as judge
    from dsrecipes.inference.chat import chat as chat
    from dsrecipes.inference.generate import generate as generate
    from dsrecipes.publish.export import export as export
    from dsrecipes.publish.verify import verify as verify
    from dsrecipes.recipe_class import load_recipe as load_recipe
    from dsrecipes.reporting.report import report as report

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `dsrecipes list` and `show` must not wait for torch."""
    if name in _EXPORTS:
        return getattr(import_module(f"dsrecipes.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'dsrecipes' has no attribute {name!r}")
