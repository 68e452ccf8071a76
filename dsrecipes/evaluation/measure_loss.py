"""How is the loss of each prepared sequence measured, as a training run would evaluate it?"""

from __future__ import annotations

import hashlib
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsrecipes.data.encode import IGNORE
from dsrecipes.data.weights import WEIGHTS

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm
    from transformers import PreTrainedModel

    from dsrecipes.evaluation.tasks import Measure, Settings
    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]


def measure_loss(run: FinishedRun, paths: dict[str, Path], settings: Settings) -> tuple[Measure, int]:
    """The summed loss of each sequence over its labels, in nats; where rows have weights, each label's times its weight.

    Args:
        run: whose tokenizer made the sequences.
        paths: prepared files by data set.
        settings: limit and batch_size.

    Returns:
        The measurement, and the number of its items.
    """
    from dsrecipes.data.sequences import Sequences

    parts = {name: Sequences(path) for name, path in paths.items()}
    sequences = ((name, part[index][0]) for name, part in parts.items() for index in range(len(part)))
    names, rows = zip(*islice(sequences, settings.limit), strict=True)
    sources = names if len(paths) > 1 else None
    return partial(_measure, run, list(rows), sources, settings.batch_size), len(rows)


def _measure(
    run: FinishedRun,
    rows: list[Json],
    sources: tuple[str, ...] | None,
    batch_size: int,
    model: PreTrainedModel,
    bar: tqdm,
) -> list[Json]:
    from dsrecipes.inference.forward import logits_at
    from dsrecipes.model.task import pad_id

    # The logits at a position predict the next token, so those before each label are computed.
    positions = [np.flatnonzero(row["labels"][1:] != IGNORE) for row in rows]
    inputs = [(row["input_ids"].tolist(), chosen.tolist()) for row, chosen in zip(rows, positions, strict=True)]
    items: list[Json] = [{} for _ in rows]
    for index, logits in logits_at(model, inputs, pad_id(run.tokenizer), batch_size):
        # compare pairs items by key: only equal token ids have comparable losses.
        key = hashlib.md5(np.array(inputs[index][0]).tobytes(), usedforsecurity=False).hexdigest()
        items[index] = {"item": f"sequence {index + 1}", "key": key} | _loss(rows[index], positions[index], logits)
        if sources:
            items[index]["source"] = sources[index]
        bar.update()
    return items


def _loss(row: Json, positions: np.ndarray, logits: torch.Tensor) -> Json:
    """The loss of a sequence, the number of its labels, and the sum of their weights where it has some."""
    import torch

    targets = torch.from_numpy(row["labels"][positions + 1].astype(np.int64)).to(logits.device)
    weights = row.get(WEIGHTS, ())
    if not len(weights):
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        return {"loss": loss, "tokens": len(targets)}
    of_labels = torch.from_numpy(weights[positions + 1].copy()).to(logits.device)
    loss = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * of_labels).sum().item()
    return {"loss": loss, "tokens": len(targets), "weight": of_labels.sum().item()}
