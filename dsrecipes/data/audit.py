"""Do rows and batches mean what they should? Checks before the first step, and of its batches.

The faults that they find train without an error and show only in a bad model: packed examples that see each other, answers
without an end token, rows that two ranks share.
"""

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
"""Rows that are examined."""
OFF = "--audit false turns the check off"
Batch = dict[str, torch.Tensor]


# ---- do packed examples influence each other? ----


@dataclass(frozen=True)
class PackedSample:
    """A micro batch of packed sequences, to be compared with the same examples in sequences of their own."""

    sequences: list[list[Features]]
    collate: Callable[[list], Batch]
    forward: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
    """Returns a batch's loss and logits, as in training but without dropout. All ranks must call it together, because under
    ZeRO-3 each holds a part of the weights."""
    exact: bool
    """Whether the forward pass computes in 32 bits."""

    def answer(self, packed: bool) -> tuple[float, torch.Tensor]:
        """Compute the loss, and the logits (labels, vocabulary) where there is a label, example by example."""
        batch = self.collate(self.sequences if packed else [[row] for row in sum(self.sequences, [])])
        trained = batch.get("shift_labels", batch["labels"]) != IGNORE
        loss, logits = self.forward(batch)
        return loss.item(), logits[trained.to(logits.device)].float()


def packed_sample(data: Sequences, batch: int, later: bool = False, **how: Any) -> PackedSample | None:
    """Choose two short examples of one of the first packed sequences; None where no sequence holds two.

    Args:
        data: the packed sequences.
        batch: sequences of the largest micro batch. Above 1 the sample has a second sequence of another length, because
            some backends separate the examples of a sequence only in a batch of one.
        later: other rows will be packed (a stream's), so the two shortest rows are taken where no sequence holds two;
            otherwise the attention would depend on the window that a run begins or resumes in.
        how: the other fields of PackedSample.
    """
    lengths = data.row_lengths()
    sequences = [np.array(data.rows(index)) for index in range(min(_ROWS, len(data)))]
    # the two shortest rows of a sequence keep the extra forward passes short
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


def difference(sample: PackedSample, packed: tuple[float, torch.Tensor], separate: tuple[float, torch.Tensor]) -> str:
    """Describe how the answer to packed examples differs from the answer to separate ones; '' where rounding explains it."""
    (loss, logits), (expected_loss, expected_logits) = packed, separate
    if logits.shape != expected_logits.shape:
        raise UserError(
            "DSR181",
            f"the collator gives packed examples {len(logits)} labels, and the same examples apart {len(expected_logits)}: fix "
            "the recipe's collator",
        )
    # only the separate answer is tested: NaN in the packed one alone is a leak
    if not expected_logits.isfinite().all():
        return ""  # the weights hold NaN, which the first step reports
    # in standard deviations of the logits: what rounding to 32 or to 16 bits may explain; a leak changes far more
    limit = 1e-4 if sample.exact else 0.1
    largest = ((logits - expected_logits).abs().max() / expected_logits.std().clamp(min=1e-9)).item()
    if largest <= limit and abs(loss - expected_loss) <= limit * max(abs(expected_loss), 1e-9):
        return ""
    return f"loss {loss:.6g} instead of {expected_loss:.6g}, logits off by {largest:.2g} standard deviations"


def check_isolation(model: PreTrainedModel, sample: PackedSample) -> None:
    """Refuse packing where the loss or the logits of an example change with the one before it.

    Models with ALiBi, learned positions of their own, or a recurrent state see across examples whatever the position ids are. So
    does any model whose collator does not restart them, and flash attention in a model that does not pass on the segments of a
    micro batch.

    Raises:
        UserError: they change; names the flag that turns packing off.
    """
    leak = difference(sample, sample.answer(packed=True), sample.answer(packed=False))
    if not leak:
        return
    is_flash = "flash" in str(model.config.get_text_config()._attn_implementation)
    other_attention = ", or --attn_implementation sdpa" if is_flash else ""
    needed = " and flash attention needs cu_seq_lens_q (dsrecipes.data.collate.segments)" if is_flash else ""
    raise UserError(
        "DSR180",
        f"packing leaks in a {type(model).__name__}: after another example, an example has {leak}. Give --packing "
        f"false{other_attention}, or fix the recipe's collator if it has one: position_ids begin at 0 in each example{needed}",
    )


# ---- rows ----


def check_ends(data: Sequences, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse rows that never train on a token that ends an answer: the model could not learn to stop.

    Raises:
        UserError: none of the first rows does.
    """
    ends = np.array(sorted({*_ends_of_generation(model), *_special_ends(tokenizer)}))
    rows = _first_rows(data)
    if not any(np.isin(row["labels"][1:], ends).any() for row in rows):
        raise UserError(
            "DSR182",
            f"none of the first {len(rows)} training rows is trained on an end token ({tokenizer.eos_token}): the model could "
            "not learn to stop. Let encode end each answer with eos (dsrecipes.data.encode.encode_segments does); "
            f"{OFF} where this is intended",
        )


def _first_rows(data: Sequences) -> list[Features]:
    """Return the first rows of each source; reading all would take minutes for large data."""
    return [row for part in data.parts.values() for row in part.examples(range(min(_ROWS, len(part.row_lengths()))))]


def _ends_of_generation(model: PreTrainedModel) -> list[int]:
    """List the ids at which the model's generation stops."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        return []
    return list(eos) if isinstance(eos, (list, tuple)) else [eos]


def _special_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """List the special tokens of no other use: eos, <|im_end|>, <|eot_id|>, <end_of_turn>."""
    named = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    ends = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special and number not in named}
    return ends | ({tokenizer.eos_token_id} - {None})


def stop_at_ends(data: Sequences, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """Let generation stop at the special tokens that end the trained answers; returns a note where it did not.

    The end-of-turn token of a chat template is often not the eos of the base model's generation_config.json.
    """
    known = _ends_of_generation(model)
    trained: set[int] = set()
    for row in _first_rows(data):
        labels = np.append(row["labels"], IGNORE)
        is_last = (labels[:-1] != IGNORE) & (labels[1:] == IGNORE)
        trained.update(labels[:-1][is_last].tolist())
    missing = sorted((trained & _special_ends(tokenizer)) - set(known))
    config = getattr(model, "generation_config", None)
    if not missing or config is None:
        return []
    config.eos_token_id = [*known, *missing]
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(missing)))
    return [f"answers end with {names}: added to eos_token_id of the saved generation_config.json, so that generation stops"]


def unlabelled(batch: Batch, rows: list[list[int]]) -> list[int]:
    """Find the prepared rows of a micro batch of which nothing is trained on.

    Args:
        batch: what the collator made of them.
        rows: the numbers of the rows in each of its sequences.
    """
    # a batch may have gone through a recipe's own collator, so nothing is assumed but the keys that a model reads
    labels = batch.get("shift_labels", batch["labels"])
    if "position_ids" not in batch or "shift_labels" not in batch:
        learned = labelled(labels).reshape(len(labels), -1).any(1).tolist()
        return [row for is_learned, numbers in zip(learned, rows, strict=True) for row in numbers if not is_learned]
    keep = batch.get("logits_to_keep")
    if keep is not None:  # then the labels of all sequences are in one line
        full = torch.full(keep.shape, IGNORE, dtype=labels.dtype)
        full[keep.cpu()] = labels.cpu()
        labels = full
    missing = []
    for line, positions, numbers in zip(labels.cpu() != IGNORE, batch["position_ids"].cpu(), rows, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(line)]
        learned = [bool(line[start:end].any()) for start, end in zip(starts, starts[1:], strict=False)]
        if len(learned) < len(numbers):  # positions do not restart: look at the sequence as a whole
            learned = [bool(line.any())] * len(numbers)
        missing += [row for row, is_learned in zip(numbers, learned, strict=False) if not is_learned]
    return missing


# ---- ranks ----


@dataclass(frozen=True)
class RankRows:
    """What a rank is about to train on, gathered from all ranks to be compared."""

    steps: int
    """Micro batches of an epoch."""
    sequences: list[int]
    """Those of the first step."""


def check_ranks(ranks: list[RankRows]) -> None:
    """Compare what the ranks are about to train on.

    Raises:
        UserError: they have different numbers of steps, or two have the same rows in the first step.
    """
    if len({rank.steps for rank in ranks}) > 1:
        counts = ", ".join(f"rank {number} {rank.steps}" for number, rank in enumerate(ranks))
        raise UserError(
            "DSR183", f"the ranks have different numbers of micro batches ({counts}): some would wait for the others forever"
        )
    # the same rows on two ranks would train without an error, on half of the data
    owner: dict[int, int] = {}
    for number, rank in enumerate(ranks):
        for index in set(rank.sequences) - {PADDING_ROW}:
            if owner.setdefault(index, number) != number:
                raise UserError(
                    "DSR184",
                    f"ranks {owner[index]} and {number} have the same rows in the first step (sequence {index}): the sampler "
                    "does not divide the data among the ranks",
                )
