"""What ends a run in the middle: a loss that is no number or exactly 0, and memory that ran out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

from dsrecipes.data.collate import labelled
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from dsrecipes.base import RecipeBase
    from dsrecipes.train.trainer import RecipeTrainer


# ---- the loss ----


class Health(IntEnum):
    """How a rank fared in a step; the greatest of all ranks is how the step fared, for a loss of 0 must be everybody's."""

    NO_LOSS = 0
    WELL = 1
    BAD_NORM = 2
    BAD_LOSS = 3


def health(losses: list[float], norm: float | None, overflowed: bool) -> Health:
    """How this rank fared.

    Args:
        losses: of its micro batches.
        norm: of the gradients, where the engine gives it.
        overflowed: whether fp16's loss scaler left the step out, which it does now and then.
    """
    if overflowed:
        return Health.WELL
    if not all(map(math.isfinite, losses)):
        return Health.BAD_LOSS
    if norm is not None and not math.isfinite(norm):
        return Health.BAD_NORM
    return Health.WELL if any(losses) else Health.NO_LOSS


def check_step(recipe: RecipeBase, trainer: RecipeTrainer) -> None:
    """Agree with the other ranks at the end of a step, and stop where its loss or gradients are no numbers, or its loss is exactly 0.

    Raises:
        UserError: the same on every rank; names step, rank, micro batch, rows, what to try and where to go on.
    """
    norm = trainer.gradient_norm
    told = [*trainer.losses, *([] if norm is None else [norm])]
    values = torch.stack([torch.as_tensor(each, dtype=torch.float32, device=trainer.args.device) for each in told]).tolist()
    losses, size = values[: len(trainer.losses)], values[len(trainer.losses)] if norm is not None else None
    overflowed = recipe.place.precision == "fp16" and trainer.accelerator.optimizer_step_was_skipped
    mine = health(losses, size, overflowed)
    if mine == Health.NO_LOSS and trainer.step_weight == 0:  # all rows of the step weigh 0
        mine = Health.WELL
    (worst,) = trainer.keeping.orders.sync(mine)
    if worst != Health.WELL:
        raise UserError(_told(Health(int(worst)), mine, losses, recipe, trainer))


def _told(worst: Health, mine: Health, losses: list[float], recipe: RecipeBase, trainer: RecipeTrainer) -> str:
    step = trainer.state.global_step
    micro = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    batches = trainer.sequences_of_step(step)
    data = trainer.train_dataset
    chosen = sum(batches, []) if micro is None else batches[micro]
    rows = [row for index in chosen for row in data.rows(index)]
    has_labels = any(bool(labelled(batch["labels"]).any()) for batch in trainer.batches)
    found = trainer.keeping.orders.all_gather((mine, micro, None if micro is None else losses[micro], rows, has_labels))
    if worst == Health.BAD_LOSS:
        rank, (_, micro, loss, rows, _) = next((i, each) for i, each in enumerate(found) if each[0] == worst)
        what = f"the loss is {loss} on rank {rank} in micro batch {(micro or 0) + 1} of {len(losses)}"
    else:
        rows = [row for each in found for row in each[3]]
        what = "the loss is exactly 0" if worst == Health.NO_LOSS else "the gradients hold NaN or infinite numbers"
    if not any(each[4] for each in found):  # a mean over no labels
        what, worst = f"{what}, for no row of the step has a label", Health.NO_LOSS
    advice = "; or ".join(switches(worst, recipe.config.train, recipe.place.engine, recipe.place.precision))
    return (
        f"step {step}: {what} ({recipe.places_of(rows)}). The run stopped before anything of this step was saved. "
        f"What to try: {advice}. {go_on(recipe)}"
    )


def switches(fault: Health, train: dict[str, Any], engine: dict[str, Any], precision: str) -> list[str]:
    """What to try, the likeliest first, by what is on.

    Args:
        train: the flags.
        engine: the resolved ZeRO JSON; empty with plain PyTorch.
    """
    found = []
    if engine.get("zero_optimization", {}).get("overlap_comm") is True:
        found.append("set overlap_comm to false in the ZeRO JSON, which has caused this")
    if fault == Health.NO_LOSS:
        return [*found, "look at the labels of these rows: a recipe's collator may leave none"]
    if precision == "fp16":
        found.append("--bf16 true instead of fp16, whose largest number is 65,504")
    if not train["max_grad_norm"]:
        found.append("--max_grad_norm 1.0 (now 0: off)")
    rate = train["learning_rate"]
    found.append(f"a tenth of the learning rate (--learning_rate {rate / 10:.3g}) or a longer warmup (--warmup_steps)")
    return found


def go_on(recipe: RecipeBase) -> str:
    """The last whole checkpoint of a run, and the flags that go on from it."""
    folder = getattr(recipe, "folder", None)
    whole = folder.complete_checkpoints() if folder else []
    if not whole:
        return "The run has no checkpoint yet: start it anew"
    return (
        f"The last whole checkpoint is {whole[-1]}: the same command with --output_dir {folder.path} "
        "--resume_from_checkpoint auto goes on from it (--allow_changed learning_rate, where that is what you change)"
    )


# ---- memory ----


@dataclass(frozen=True)
class Load:
    """What decides how much memory a rank needs; sizes in bytes."""

    micro: int
    accumulation: int
    world: int
    max_length: int
    checkpointing: bool
    stage: int | None
    offloads: bool
    lora_r: int
    in_4bit: bool
    on_device: bool
    """Whether the memory that ran out is an accelerator's."""
    weights: int = 0
    """Of the whole model; 0 where it is not known yet."""
    states: int = 0
    """Gradients and optimizer states of all that is trained."""
    training: bool = True
    """False while the model is loaded: no batch is there yet."""


def remedies(load: Load) -> list[str]:
    """What to change, the cheapest first, each with this run's numbers; what is on already or would not help is left out."""
    found = []
    if load.training:
        if load.micro > 1:
            found.append(
                f"--per_device_train_batch_size {load.micro // 2} --gradient_accumulation_steps "
                f"{load.accumulation * load.micro // (load.micro // 2)} (now {load.micro} and {load.accumulation}; the same "
                f"{load.micro * load.accumulation * load.world} sequences a step)"
                if load.micro % 2 == 0
                else f"--per_device_train_batch_size 1 --gradient_accumulation_steps {load.accumulation * load.micro} "
                f"(now {load.micro} and {load.accumulation})"
            )
        if not load.checkpointing:
            found.append("--gradient_checkpointing true (activations of one layer at a time; a third slower)")
        if load.max_length >= 128:
            found.append(f"--max_length {load.max_length // 2} (now {load.max_length}; longer rows are dropped)")
    if load.world > 1 and (load.stage or 0) < 3:
        share = f" (weights {_gb(load.weights)} a rank, then {_gb(load.weights / load.world)})" if load.weights else ""
        found.append(f"--deepspeed zero3{share}")
    if load.on_device and not load.offloads and load.training:
        stage = load.stage if load.stage in (1, 2, 3) else 2
        share = f" ({_gb(load.states / load.world)} of optimizer states a rank go to host memory)" if load.states else ""
        found.append(f"--deepspeed zero{stage}_offload{share}")
    if not load.lora_r:
        share = f" (gradients and optimizer states are {_gb(load.states)} now)" if load.states else ""
        found.append(f"--lora_r 16{share}")
    elif not load.in_4bit:
        share = f" (weights {_gb(load.weights)}, then about a quarter)" if load.weights else ""
        found.append(f"--load_in_4bit true{share}")
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def out_of_memory(load: Load, rank: int, error: BaseException, where: str) -> str:
    """The message: what ran out, and what to change in order."""
    what = "device memory" if load.on_device else "host memory"
    steps = "".join(f"\n  {number}. {each}" for number, each in enumerate(remedies(load), 1))
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    listed = f" What to change, in this order:{steps}" if steps else " Take a smaller model or more memory."
    return f"rank {rank} ran out of {what} {where}: {first[:160]}.{listed}"


def load_of(recipe: RecipeBase) -> Load:
    """The numbers of a run, as far as it has come."""
    from dsrecipes.model.task import count_parameters

    place, config = recipe.place, recipe.config
    model = getattr(recipe, "model", None)
    trained, frozen = count_parameters(model) if model is not None else (0, 0)
    width = {"fp32": 4}.get(place.precision, 2)
    return Load(
        place.micro, place.accumulation, place.ranks.world, config.data.max_length, bool(config.train["gradient_checkpointing"]),
        place.zero.stage if place.zero else None, bool(place.zero and place.zero.offloads_optimizer), config.model.lora_r,
        config.model.load_in_4bit, place.device != "cpu", (trained + frozen) * width,
        # 12 bytes in 16-bit training (Rajbhandari et al.), the gradient beside them; in fp32 Adam's two moments
        trained * (14 if width == 2 else 12), model is not None,
    )  # fmt: skip
