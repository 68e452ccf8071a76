"""What `verify` compares a saved model with: the live engine's logits, and fingerprints of what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsrecipes.data.collate import TOKEN_COUNTS
from dsrecipes.data.sequences import Sequences
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import UserError, plural
from dsrecipes.io.disk import checksum
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.weights import fingerprint, read_tensors, weight_files

Batch = dict[str, torch.Tensor]
_TEXTS = ("Read 3 pages.", "臺灣最高的山是玉山。", "def half(x):\n\treturn x / 2  # naïve", "<s> [INST] a </s> <|im_end|>")
RANDOM_LENGTH = 16
"""Tokens of a row of random ids, at most."""
_ROWS, _WIDTH, _KEPT = 2, 64, 4
"""Number of training rows and their length in tokens; positions from the end whose logits are recorded."""
_NOT_INPUTS = ("labels", WEIGHTS, TOKEN_COUNTS)
"""What of a batch the model is not given."""
_FACTS = {
    "step": int, "auto_class": str, "precision": str, "dtype": str, "learned": bool, "tokenizer": dict, "weights": dict,
    "files": dict,
}  # fmt: skip
"""What is recorded beside the logits."""


def random_inputs(auto_class: str, vocabulary: int, length: int, seed: int) -> Batch:
    """Two rows of random ids, each of four choices for multiple choice."""
    shape = (2, 4, length) if auto_class.endswith("ForMultipleChoice") else (2, length)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids} if auto_class.endswith("ForCausalLM") else {"input_ids": ids, "attention_mask": ids * 0 + 1}


def first_rows(data: Sequences, collate: Callable[[list], Batch], auto_class: str) -> Batch:
    """The first tokens of the first training rows; for a causal model one example a row and no mask, so none is packed."""
    items = [data[i] for i in range(min(_ROWS, len(data)))]
    if auto_class.endswith("ForCausalLM"):
        width = min(_WIDTH, *(len(item[0]["input_ids"]) for item in items))
        return {"input_ids": torch.tensor([item[0]["input_ids"][:width].tolist() for item in items])}
    batch = {key: value for key, value in collate(items).items() if key not in _NOT_INPUTS}
    shape = batch["input_ids"].shape
    return {key: value[..., :_WIDTH] if value.shape == shape else value for key, value in batch.items()}


def logits_of(model: PreTrainedModel, batch: Batch, auto_class: str) -> torch.Tensor:
    """Logits in fp32 on the CPU; of a causal model those of the last positions."""
    causal = auto_class.endswith("ForCausalLM")
    model.eval()
    with torch.no_grad():
        logits = model(**batch, **({"use_cache": False} if causal else {})).logits
    return (logits[:, -_KEPT:] if causal else logits).float().cpu().contiguous()


def allowed_difference(logits: torch.Tensor, precision: str, four_bit: bool) -> float:
    """How far rounding may move the logits of the same weights, in units of the logits or of their standard deviation."""
    share = 1e-4
    if precision != "fp32":
        share = 0.2  # of 8 bits or 11 bits of mantissa, over all layers; another model's logits differ by several
    elif four_bit:
        share = 1e-2
    return share * max(1.0, logits.std().item())


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Ids of fixed texts, and the number of tokens."""
    return {"size": len(tokenizer), "texts": {text: tokenizer(text)["input_ids"] for text in _TEXTS}}


def _saved_tensors(model: Path) -> dict[str, str]:
    """Name and fingerprint of each tensor; none where the save went wrong, which verify tells once all ranks are done."""
    try:
        return {name: fingerprint(tensor) for path in weight_files(model) for name, tensor in read_tensors(path)}
    except UserError:
        return {}


def save_reference(
    model: PreTrainedModel, batches: dict[str, Batch], facts: dict[str, Any], folder: RunFolder | None
) -> None:
    """Write expected.safetensors once model/ is saved: the live engine's logits, and what model/ holds.

    Args:
        model: the trained model; all ranks must call this, because ZeRO-3 needs them all for a forward pass.
        batches: inputs by name, on the model's device.
        facts: what else `read_reference` returns: step, auto_class, precision, dtype, learned, tokenizer.
        folder: the run folder; None on all ranks but the first, which write nothing.
    """
    recorded: Batch = {}
    for name, batch in batches.items():
        recorded |= {f"{name}/{key}": value.cpu().contiguous() for key, value in batch.items()}
        recorded[f"{name}/logits"] = logits_of(model, batch, facts["auto_class"])
    if folder is None:
        return
    folder.verified.unlink(missing_ok=True)  # it is about an earlier model/
    others = [path for path in folder.model.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".md")]
    facts = facts | {
        "weights": _saved_tensors(folder.model),
        "files": {path.relative_to(folder.model).as_posix(): checksum(path) for path in sorted(others)},
    }
    staged = folder.reference.with_suffix(".partial")
    save_file(recorded, staged, metadata={"facts": json.dumps(facts, ensure_ascii=False)})
    staged.rename(folder.reference)


def read_reference(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Batch]]:
    """What was recorded: the facts, and by name inputs with their logits.

    Raises:
        UserError: nothing was, or it cannot be read.
    """
    if not folder.reference.is_file():
        raise UserError(
            f"{folder.path}: nothing to verify against, {folder.reference.name} is missing. It is written when training ends; "
            "a run of an older version has none"
        )
    batches: dict[str, Batch] = {}
    for key, tensor in read_tensors(folder.reference):
        name, _, part = key.partition("/")
        batches.setdefault(name, {})[part] = tensor
    try:
        with safe_open(folder.reference, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        for name, kind in _FACTS.items():
            if not isinstance(facts[name], kind):
                raise TypeError(name)
        dtype, texts = getattr(torch, facts["dtype"]), facts["tokenizer"]["texts"]
        whole = isinstance(dtype, torch.dtype) and isinstance(texts, dict) and facts["auto_class"].startswith("AutoModelFor")
        if not whole or not batches or not all("logits" in each for each in batches.values()):
            raise ValueError(facts["auto_class"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder.reference} is damaged: it does not hold what was recorded when training ended") from error
    return facts, batches


def describe_verification(facts: dict[str, Any]) -> str:
    """VERIFIED.json in words."""
    return f"{plural(facts['tensors'], 'tensor')}, largest difference {facts['largest_difference']:.1g} (allowed {facts['allowed']:.1g})"
