"""Checks before and in the first step that rows and batches mean what they should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsrecipes.data.collate import labelled
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.sequences import PADDING_ROW, Features, Sequences
from dsrecipes.errors import UserError

_ROWS = 256
"""Rows whose ends are looked at."""
OFF = "--audit false leaves the check out"
Batch = dict[str, torch.Tensor]


# ---- do packed examples see each other? ----


@dataclass(frozen=True)
class PackedSample:
    """A micro batch of packed sequences, to be compared with the same examples in rows of their own."""

    sequences: list[list[Features]]
    collate: Callable[[list], Batch]
    forward: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
    """A batch's loss and logits, as in training but without dropout; all ranks must call it together, for under ZeRO-3
    each holds a part of the weights."""
    exact: bool
    """Whether the forward pass computes in 32 bits."""

    def answer(self, packed: bool) -> tuple[float, torch.Tensor]:
        """Loss, and logits (labels, vocabulary) where there is a label, example by example."""
        batch = self.collate(self.sequences if packed else [[row] for row in sum(self.sequences, [])])
        trained = batch.get("shift_labels", batch["labels"]) != IGNORE
        loss, logits = self.forward(batch)
        return loss.item(), logits[trained.to(logits.device)].float()


def packed_sample(data: Sequences, batch: int, later: bool = False, **how: Any) -> PackedSample | None:
    """Two examples of one of the first packed sequences, as short as they are found; None where no sequence holds two.

    Args:
        batch: sequences of the largest micro batch. Above 1 the sample has a second sequence, of another length, because
            some backends separate the examples of a sequence only in a batch of one.
        later: other rows will be packed (a stream's), so that the two shortest are taken where no sequence holds two; else
            the attention would depend on the window that a run begins or resumes in.
    """
    lengths = data.row_lengths()
    sequences = [np.array(data.rows(index)) for index in range(min(_ROWS, len(data)))]
    pairs = [rows[np.argsort(lengths[rows], kind="stable")[:2]] for rows in sequences if len(rows) > 1]
    if not pairs:
        if not later:
            return None
        pairs = [np.resize(np.argsort(lengths, kind="stable")[:2], 2)]
    pairs.sort(key=lambda pair: lengths[pair].sum())
    chosen = [pairs[0].tolist()]
    if batch > 1:
        total = lengths[pairs[0]].sum()
        others = [pair.tolist() for pair in pairs[1:] if lengths[pair].sum() != total]
        chosen.append(others[0] if others else chosen[0][:1])
    return PackedSample([data.examples(rows) for rows in chosen], **how)


def difference(sample: PackedSample, packed: tuple[float, torch.Tensor], apart: tuple[float, torch.Tensor]) -> str:
    """How the answer to packed examples differs from the answer to each by itself; empty where rounding explains it."""
    (loss, logits), (expected, wanted) = packed, apart
    if logits.shape != wanted.shape:
        raise UserError(
            f"the collator gives packed examples {len(logits)} labels, and the same examples apart {len(wanted)}: fix the "
            "recipe's collator"
        )
    if not wanted.isfinite().all():
        return ""  # weights that hold NaN, which the first step names
    limit = 1e-4 if sample.exact else 0.1
    largest = ((logits - wanted).abs().max() / wanted.std().clamp(min=1e-9)).item()
    if largest <= limit and abs(loss - expected) <= limit * max(abs(expected), 1e-9):
        return ""
    return f"loss {loss:.6g} instead of {expected:.6g}, logits off by {largest:.2g} standard deviations"


def check_isolation(model: PreTrainedModel, sample: PackedSample) -> None:
    """Refuse packing where an example's loss or logits change with the one before it.

    Models with ALiBi, learned positions of their own, or a recurrent state look across examples whatever the position
    ids say; so does any model where a collator does not restart them, and flash attention in a model that does not pass
    it the segments of a micro batch.

    Raises:
        UserError: they change; names the flag that turns packing off.
    """
    apart = difference(sample, sample.answer(packed=True), sample.answer(packed=False))
    if apart:
        attention = model.config.get_text_config()._attn_implementation
        other = ", or --attn_implementation sdpa" if "flash" in str(attention) else ""
        raise UserError(
            f"packing leaks in a {type(model).__name__}: behind another one, an example has {apart}. Give --packing "
            f"false{other}, or fix the recipe's collator if it has one: position_ids begin at 0 in each example"
            f"{' and flash attention needs cu_seq_lens_q (dsrecipes.data.collate.segments)' if other else ''}"
        )


# ---- rows ----


def check_ends(data: Sequences, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse rows of which none ever trains on a token that ends an answer: the model could not learn to stop.

    Raises:
        UserError: none of the first rows does.
    """
    ends = np.array(sorted({*_own_ends(model), *_special_ends(tokenizer)}))
    first = _first_rows(data)
    rows = len(first)
    if not any(np.isin(row["labels"][1:], ends).any() for row in first):
        raise UserError(
            f"none of the first {rows} training rows is trained on an end token ({tokenizer.eos_token}): the model could not "
            "learn to stop. Let encode end each answer with eos (dsrecipes.data.encode.encode_segments does); "
            f"{OFF} where that is meant"
        )


def _first_rows(data: Sequences) -> list[Features]:
    """The first rows of each source."""
    return [row for part in data.parts.values() for row in part.examples(range(min(_ROWS, len(part.row_lengths()))))]


def _own_ends(model: PreTrainedModel) -> list[int]:
    """Where the model's generation stops by itself."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]


def _special_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """eos, <|im_end|>, <|eot_id|>, <end_of_turn>: special, and of no other use."""
    named = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    ends = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special and number not in named}
    return ends | ({tokenizer.eos_token_id} - {None})


def stop_at_ends(data: Sequences, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """Let generation stop at the special tokens that answers are trained to end with, and return a note where it did not.

    A chat template's end-of-turn token is often not the eos of the base model's generation_config.json.
    """
    own, special = _own_ends(model), _special_ends(tokenizer)
    trained: set[int] = set()
    for row in _first_rows(data):
        labels = np.append(row["labels"], IGNORE)
        trained.update(labels[:-1][(labels[:-1] != IGNORE) & (labels[1:] == IGNORE)].tolist())
    missing = sorted((trained & special) - set(own))
    if not missing or getattr(model, "generation_config", None) is None:
        return []
    model.generation_config.eos_token_id = [*own, *missing]
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(missing)))
    return [f"answers end with {names}: added to eos_token_id of the saved generation_config.json, so that generation stops"]


def unlabelled(batch: Batch, rows: list[list[int]]) -> list[int]:
    """Prepared rows of a micro batch of which no token, or no answer, is trained on.

    Args:
        batch: what the collator made of them.
        rows: the numbers of the rows in each of its sequences.
    """
    labels = batch.get("shift_labels", batch["labels"])
    if "position_ids" not in batch or "shift_labels" not in batch:
        learned = labelled(labels).reshape(len(labels), -1).any(1).tolist()
        return [row for line, each in zip(learned, rows, strict=True) for row in each if not line]
    keep = batch.get("logits_to_keep")
    if keep is not None:  # the labels of all sequences in one line
        full = torch.full(keep.shape, IGNORE, dtype=labels.dtype)
        full[keep.cpu()] = labels.cpu()
        labels = full
    missing = []
    for line, positions, each in zip(labels.cpu() != IGNORE, batch["position_ids"].cpu(), rows, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(line)]
        found = [bool(line[start:end].any()) for start, end in zip(starts, starts[1:], strict=False)]
        if len(found) < len(each):  # positions do not restart: the sequence as a whole
            found = [bool(line.any())] * len(each)
        missing += [row for row, learned in zip(each, found, strict=False) if not learned]
    return missing


# ---- ranks ----


@dataclass(frozen=True)
class RankRows:
    """What a rank is about to train on."""

    steps: int
    sequences: list[int]
    """Those of the first step."""


def check_ranks(found: list[RankRows]) -> None:
    """Compare what the ranks are about to train on.

    Raises:
        UserError: they have different numbers of steps, or two have the same rows in the first step.
    """
    counts = [each.steps for each in found]
    if len(set(counts)) > 1:
        told = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(counts))
        raise UserError(f"the ranks have different numbers of micro batches ({told}): the others would wait for ever")
    owner: dict[int, int] = {}
    for rank, each in enumerate(found):
        for index in set(each.sequences) - {PADDING_ROW}:
            if owner.setdefault(index, rank) != rank:
                raise UserError(
                    f"ranks {owner[index]} and {rank} have the same rows in the first step (sequence {index}): the sampler "
                    "does not divide the data among the ranks"
                )
