"""Is a step's loss or gradient unusable, on which rank and rows, and what can be tried?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from dsrecipes.data.collate import labelled
from dsrecipes.errors import UserError
from dsrecipes.runs.folder import RunFolder
from dsrecipes.train.loaders import sequences_of_step
from dsrecipes.train.state import Run


class Health(IntEnum):
    """The result of a step on one rank.

    The greatest of all ranks is the result of the step: NO_LOSS is the smallest because a rank may have only padding in an
    epoch's last step, so a loss of 0 is a fault only where every rank has it.
    """

    NO_LOSS = 0
    OK = 1
    BAD_NORM = 2
    BAD_LOSS = 3


def health(losses: list[float], norm: float | None, overflowed: bool) -> Health:
    """Judge a step on this rank.

    Args:
        losses: of its micro batches.
        norm: of the gradients, where the engine gives it.
        overflowed: whether fp16's loss scaler skipped the step, which it does now and then.
    """
    # before the other checks: an overflow's gradients are infinite, and the scaler has dropped them already
    if overflowed:
        return Health.OK
    if not all(map(math.isfinite, losses)):
        return Health.BAD_LOSS
    if norm is not None and not math.isfinite(norm):
        return Health.BAD_NORM
    return Health.OK if any(losses) else Health.NO_LOSS


def check_step(run: Run) -> None:
    """Agree with the other ranks on a step's result, and stop where loss or gradients are not finite, or the loss is exactly 0.

    Raises:
        UserError: the same on every rank; names step, rank, micro batch, rows, what to try and where to resume.
    """
    trainer = run.trainer
    norm = trainer.step_end.gradient_norm
    figures = [*trainer.losses, *([] if norm is None else [norm])]
    # one transfer for all figures, because each one waits for the accelerator
    device = trainer.args.device
    values = torch.stack([torch.as_tensor(figure, dtype=torch.float32, device=device) for figure in figures]).tolist()
    losses = values[: len(trainer.losses)]
    norm_value = values[len(trainer.losses)] if norm is not None else None
    overflowed = run.prepared.setup.precision == "fp16" and trainer.accelerator.optimizer_step_was_skipped
    own = health(losses, norm_value, overflowed)
    # where all rows of the step have weight 0, a loss of 0 is right
    if own == Health.NO_LOSS and trainer.step_loss.weight == 0:
        own = Health.OK
    (worst,) = run.signals.sync(own)
    if worst != Health.OK:
        raise UserError("DSR361", _describe(Health(int(worst)), own, losses, run))


@dataclass(frozen=True)
class _Finding:
    """What one rank contributes to the message."""

    health: Health
    micro_batch: int | None
    """The first whose loss is not finite."""
    loss: float | None
    rows: list[int]
    has_labels: bool


def _describe(worst: Health, own: Health, losses: list[float], run: Run) -> str:
    """Compose the message; a collective call."""
    trainer, setup = run.trainer, run.prepared.setup
    step, data = trainer.state.global_step, trainer.train_dataset
    micro = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
    batches = sequences_of_step(trainer, step)
    sequences = sum(batches, []) if micro is None else batches[micro]
    rows = [row for sequence in sequences for row in data.rows(sequence)]
    has_labels = any(bool(labelled(batch["labels"]).any()) for batch in trainer.batches)
    own_finding = _Finding(own, micro, None if micro is None else losses[micro], rows, has_labels)
    # gathered before anything is raised: a rank that raised alone would leave the others in a collective
    findings: list[_Finding] = run.signals.all_gather(own_finding)
    if worst == Health.BAD_LOSS:
        rank, finding = next(pair for pair in enumerate(findings) if pair[1].health == worst)
        rows = finding.rows
        number = (finding.micro_batch or 0) + 1
        what = f"the loss is {finding.loss} on rank {rank} in micro batch {number} of {len(losses)}"
    else:
        rows = [row for finding in findings for row in finding.rows]
        what = "the loss is exactly 0" if worst == Health.NO_LOSS else "the gradients hold NaN or infinite numbers"
    # the loss is then a mean over no labels, which some models give as NaN and others as 0
    if not any(finding.has_labels for finding in findings):
        what, worst = f"{what}, because no row of the step has a label", Health.NO_LOSS
    advice = "; or ".join(nan_remedies(worst, run.prepared.config.train, setup.engine, setup.precision))
    return (
        f"step {step}: {what} ({run.prepared.describe_rows(rows)}). The run stopped before anything of this step was saved. "
        f"What to try: {advice}. {how_to_resume(run.folder)}"
    )


def nan_remedies(fault: Health, train: dict[str, Any], engine: dict[str, Any], precision: str) -> list[str]:
    """List what to try, the likeliest first, by what is on.

    Args:
        fault: of the step.
        train: the flags.
        engine: the resolved ZeRO JSON; empty with plain PyTorch.
        precision: fp32, bf16 or fp16.
    """
    remedies = []
    if engine.get("zero_optimization", {}).get("overlap_comm") is True:
        remedies.append("set overlap_comm to false in the ZeRO JSON, which has caused this")
    # precision, clipping and learning rate change no label
    if fault == Health.NO_LOSS:
        return [*remedies, "look at the labels of these rows: a recipe's collator may leave none"]
    if precision == "fp16":
        remedies.append("--bf16 true instead of fp16, whose largest number is 65,504")
    if not train["max_grad_norm"]:
        remedies.append("--max_grad_norm 1.0 (now 0: off)")
    rate = train["learning_rate"]
    remedies.append(f"a tenth of the learning rate (--learning_rate {rate / 10:.3g}) or a longer warmup (--warmup_steps)")
    return remedies


def how_to_resume(folder: RunFolder) -> str:
    """Name the last complete checkpoint of a run, and the flags that resume from it."""
    complete = folder.complete_checkpoints()
    if not complete:
        return "The run has no checkpoint yet: restart it"
    return (
        f"The last complete checkpoint is {complete[-1]}: the same command with --output_dir {folder.path} "
        "--resume_from_checkpoint auto resumes from it (--allow_changed learning_rate, if that is what you change)"
    )
