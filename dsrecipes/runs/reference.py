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
RANDOM_LENGTH = 16
"""Tokens of a row of random ids, at most."""
# English, Chinese, code with a tab and a non-ASCII letter, and the special tokens of Llama and ChatML
_TEXTS = ("Read 3 pages.", "臺灣最高的山是玉山。", "def half(x):\n\treturn x / 2  # naïve", "<s> [INST] a </s> <|im_end|>")
_ROWS = 2
"""Training rows that are recorded."""
_LENGTH = 64
"""Their length in tokens, at most."""
_POSITIONS = 4
"""Positions from the end whose logits are recorded for a causal model."""
_NOT_INPUTS = ("labels", WEIGHTS, TOKEN_COUNTS)
"""Keys of a batch that the model's forward pass does not receive."""
_FACTS = {
    "step": int,
    "auto_class": str,
    "precision": str,
    "dtype": str,
    "learned": bool,
    "tokenizer": dict,
    "weights": dict,
    "files": dict,
}
"""Fact that is recorded with the logits -> its type."""


def random_inputs(auto_class: str, vocabulary: int, length: int, seed: int) -> Batch:
    """Two rows of random ids, (2, length), or (2, 4, length) for multiple choice."""
    shape = (2, 4, length) if auto_class.endswith("ForMultipleChoice") else (2, length)
    # a generator of its own leaves the random numbers of the run alone
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    if auto_class.endswith("ForCausalLM"):
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def first_rows(data: Sequences, collate: Callable[[list], Batch], auto_class: str) -> Batch:
    """The first tokens of the first training rows, as inputs of the model.

    For a causal model one example per row, without a mask: packing and padding are not compared here.
    """
    items = [data[i] for i in range(min(_ROWS, len(data)))]
    if auto_class.endswith("ForCausalLM"):
        length = min(_LENGTH, *(len(item[0]["input_ids"]) for item in items))
        return {"input_ids": torch.tensor([item[0]["input_ids"][:length].tolist() for item in items])}
    batch = {key: value for key, value in collate(items).items() if key not in _NOT_INPUTS}
    shape = batch["input_ids"].shape
    return {key: value[..., :_LENGTH] if value.shape == shape else value for key, value in batch.items()}


def logits_of(model: PreTrainedModel, batch: Batch, auto_class: str) -> torch.Tensor:
    """Logits in fp32 on the CPU; of a causal model only those of the last positions."""
    causal = auto_class.endswith("ForCausalLM")
    options = {"use_cache": False} if causal else {}
    # dropout would make the logits random
    model.eval()
    with torch.no_grad():
        logits = model(**batch, **options).logits
    return (logits[:, -_POSITIONS:] if causal else logits).float().cpu().contiguous()


def allowed_difference(logits: torch.Tensor, precision: str, four_bit: bool) -> float:
    """How far rounding may move the logits of the same weights: a share of their standard deviation, which counts as 1 at least.

    bf16 and fp16 have 8 and 11 bits of mantissa, and errors add up over all layers; the logits of another model differ
    by several standard deviations.
    """
    share = 1e-4
    if precision != "fp32":
        share = 0.2
    elif four_bit:
        share = 1e-2
    return share * max(1.0, logits.std().item())


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Number of tokens, and the ids of fixed texts."""
    return {"size": len(tokenizer), "texts": {text: tokenizer(text)["input_ids"] for text in _TEXTS}}


def saved_fingerprints(model: Path) -> dict[str, str]:
    """Name and fingerprint of each saved tensor; none where the save went wrong, which verify reports after all ranks end."""
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
    recorded: Batch = {}  # safetensors holds flat names: "random ids/input_ids"
    for name, batch in batches.items():
        recorded |= {f"{name}/{key}": value.cpu().contiguous() for key, value in batch.items()}
        recorded[f"{name}/logits"] = logits_of(model, batch, facts["auto_class"])
    if folder is None:
        return
    # it is about an earlier model/
    folder.verified.unlink(missing_ok=True)
    # weights have a fingerprint for each tensor, and a model card is for its user to edit
    others = [path for path in folder.model.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".md")]
    facts = facts | {
        "weights": saved_fingerprints(folder.model),
        "files": {path.relative_to(folder.model).as_posix(): checksum(path) for path in sorted(others)},
    }
    # Renamed when it is complete, so that a killed run leaves no half-written reference.
    staged = folder.reference.with_suffix(".partial")
    save_file(recorded, staged, metadata={"facts": json.dumps(facts, ensure_ascii=False)})
    staged.rename(folder.reference)


def read_reference(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Batch]]:
    """Read the recorded facts, and by name the inputs with their logits.

    Raises:
        UserError: nothing was recorded, or it is damaged.
    """
    path = folder.reference
    if not path.is_file():
        raise UserError(
            "DSR333",
            f"{folder.path}: nothing to verify against, {path.name} is missing. It is written when training ends; "
            "a run of an older version has none",
        )
    batches: dict[str, Batch] = {}
    for key, tensor in read_tensors(path):
        name, _, part = key.partition("/")
        batches.setdefault(name, {})[part] = tensor
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        _check_facts(facts, batches)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = "it does not hold what is recorded when training ends"
        raise UserError("DSR334", f"{path} is damaged: {problem}") from error
    return facts, batches


def _check_facts(facts: dict[str, Any], batches: dict[str, Batch]) -> None:
    """Check names and types (ValueError, LookupError, TypeError or AttributeError)."""
    for name, kind in _FACTS.items():
        if not isinstance(facts[name], kind):
            raise TypeError(name)
    if not isinstance(getattr(torch, facts["dtype"]), torch.dtype) or not isinstance(facts["tokenizer"]["texts"], dict):
        raise TypeError(facts["dtype"])
    if not facts["auto_class"].startswith("AutoModelFor"):
        raise ValueError(facts["auto_class"])
    if not batches or not all("logits" in batch for batch in batches.values()):
        raise ValueError("logits")


def describe_verification(facts: dict[str, Any]) -> str:
    """VERIFIED.json in words."""
    count = plural(facts["tensors"], "tensor")
    return f"{count}, largest difference {facts['largest_difference']:.1g} (allowed {facts['allowed']:.1g})"
