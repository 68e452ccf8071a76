"""How a checkpoint is loaded into an engine with another number of ranks, or another ZeRO stage, than wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsrecipes.errors import UserError
from dsrecipes.zero.checkpoint_states import COUNTERS, ROUND_ROBIN, WEIGHT, WRAPPED, CheckpointStates, read_states
from dsrecipes.zero.internals import (
    FlatGroup,
    Span,
    flat_groups,
    inner_optimizer,
    set_counters,
    set_loss_scaler,
    shard_parameters,
    update_weights,
)


def load(model: torch.nn.Module, engine: Any | None, optimizer: Any, scheduler: Any, step: int, checkpoint: Path) -> None:
    """Load weights, moments, steps, learning rates and counters of a checkpoint into a started engine.

    Every rank reads its own part, and no rank waits for another before all have read.

    Args:
        model: without the engine around it.
        engine: DeepSpeed's; None with plain PyTorch.
        optimizer: the one that the trainer steps; with an engine, the engine's own is used.
        scheduler: the trainer's; an engine with a scheduler block has its own.
        step: optimizer steps of the checkpoint.
        checkpoint: its folder.

    Raises:
        UserError: the checkpoint belongs to another model, or its state cannot be resharded.
    """
    # DeepSpeed groups parameters by object; a checkpoint names them.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wrapper = engine.optimizer if engine is not None else optimizer
    stepped = inner_optimizer(wrapper)
    # Only ZeRO-1 and 2 distribute gradients round robin; ZeRO-3 ignores the key.
    if engine is not None and engine.zero_optimization_stage() in (1, 2) and engine.zero_round_robin_gradients():
        raise UserError("DSR273", f"{checkpoint}: {ROUND_ROBIN}")
    shard_parameters(wrapper)
    groups = flat_groups(wrapper, names)
    if groups is None:
        raise UserError("DSR273", WRAPPED)
    # The order matters only for checkpoints that number states instead of naming them (plain PyTorch and ZeRO-0).
    saved = read_states(checkpoint, [span.name for group in groups for _, spans in group for span in spans])
    _check_same_parameters(saved, groups, checkpoint)
    with torch.no_grad():
        for group, options in zip(groups, stepped.param_groups, strict=True):
            for flat, spans in group:
                _fill(flat, spans, saved, stepped, options)
        for name, buffer in model.named_buffers():
            if name in saved.buffers:
                buffer.copy_(saved.buffers[name])
    # The optimizer has fp32 copies; the model computes with their rounded values.
    update_weights(wrapper)
    saved_groups = [_saved_group(group, saved) for group in groups]
    _restore_schedule(scheduler, getattr(engine, "lr_scheduler", None), stepped, saved, saved_groups, checkpoint)
    if engine is not None:
        counters = {"global_steps": step, "global_samples": step * engine.train_batch_size(), "skipped_steps": 0}
        values = counters | saved.engine
        set_counters(engine, {name: values[name] for name in COUNTERS})
        set_loss_scaler(wrapper, values.get("loss_scaler", {}))


def _check_same_parameters(saved: CheckpointStates, groups: list[FlatGroup], checkpoint: Path) -> None:
    numels = {span.name: span.numel for group in groups for _, spans in group for span in spans}
    for name, numel in numels.items():
        if saved.numel(name) != numel:
            raise UserError(
                "DSR275",
                f"{checkpoint} has {saved.numel(name):,} elements of {name}, and this run's model {numel:,}: it was "
                "written by another model",
            )
    extra = sorted(set(saved.fragments) - set(numels))
    if extra:
        raise UserError(
            "DSR275", f"{checkpoint} has trained {extra[0]}, which this run does not train: it was written by another run"
        )


def _fill(
    flat: torch.Tensor, spans: list[Span], saved: CheckpointStates, optimizer: torch.optim.Optimizer, options: dict[str, Any]
) -> None:
    """Fill one tensor that the optimizer steps, and its optimizer state, from the checkpoint."""
    if not spans:
        return
    state: dict[str, Any] = {}
    for key in saved.keys(spans[0].name):
        target = flat.data.view(-1) if key == WEIGHT else torch.zeros_like(flat).view(-1)
        for span in spans:
            if span.length:
                values = saved.piece(span.name, key, span.start, span.start + span.length)
                target[span.offset : span.offset + span.length] = values.to(target.device, target.dtype)
        if key != WEIGHT:
            state[key] = target.view_as(flat)
    step = saved.steps[spans[0].name]
    if type(optimizer).__module__.startswith("torch."):
        # torch keeps the step of a fused or capturable optimizer on the device, of any other on the CPU.
        device = flat.device if options.get("fused") or options.get("capturable") else "cpu"
        state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
    else:
        # DeepSpeed's own optimizers pass it to C++ as an integer.
        state["step"] = int(step)
    # Optimizers create their state at the first step; before that there is none to copy into.
    optimizer.state[flat] = state


def _saved_group(group: FlatGroup, saved: CheckpointStates) -> int:
    """The number that a group of parameters has in the checkpoint."""
    names = [span.name for _, spans in group for span in spans]
    return saved.groups[names[0]] if names else 0


def _restore_schedule(
    scheduler: Any,
    engine_scheduler: Any | None,
    optimizer: torch.optim.Optimizer,
    saved: CheckpointStates,
    saved_groups: list[int],
    checkpoint: Path,
) -> None:
    """Restore the scheduler's position and the learning rates that it had set.

    Args:
        saved_groups: number of each group in the checkpoint.
    """
    file = checkpoint / "scheduler.pt"
    state = saved.engine.get("lr_scheduler")
    if file.is_file():
        state = torch.load(file, weights_only=True)
    elif engine_scheduler is not None and state:
        scheduler = engine_scheduler
    else:
        raise UserError(
            "DSR276",
            f"{checkpoint} holds the schedule of a ZeRO JSON's scheduler block, which this run does not have: resume with it",
        )
    # Schedulers keep lists with one entry per group, and the groups may be numbered differently here.
    number = len(saved.rates)
    by_group = {key: value for key, value in state.items() if isinstance(value, list) and len(value) == number}
    reordered = {key: [value[group] for group in saved_groups] for key, value in by_group.items()}
    scheduler.load_state_dict(state | reordered)
    for options, group in zip(optimizer.param_groups, saved_groups, strict=True):
        options["lr"] = saved.rates[group]
