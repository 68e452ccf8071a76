"""A checkpoint put into an engine of another number of ranks or another ZeRO stage than wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsrecipes.errors import UserError
from dsrecipes.zero.checkpoint_states import COUNTERS, ROUND_ROBIN, WEIGHT, WRAPPED, CheckpointStates, read_states


@dataclass
class _Span:
    """Where a piece of a parameter lies in a flat tensor of the optimizer."""

    name: str
    numel: int
    start: int
    """First element of the piece in the parameter."""
    length: int
    offset: int
    """Where it begins in the flat tensor."""


_Group = list[tuple[torch.Tensor, list[_Span]]]
"""The tensors that an optimizer steps for one group of parameters, each with what it is made of."""


def load(model: torch.nn.Module, engine: Any | None, optimizer: Any, scheduler: Any, step: int, checkpoint: Path) -> None:
    """Give a started engine the weights, moments, steps, learning rates and counters of a checkpoint.

    Every rank reads its own part, and no rank waits for another before all have read.

    Args:
        model: without the engine around it.
        engine: DeepSpeed's; None with plain PyTorch.
        optimizer: the one that the trainer steps; with an engine, the engine's own is used.
        scheduler: the trainer's; an engine with a scheduler block has its own.
        step: optimizer steps of the checkpoint.
        checkpoint: its folder.

    Raises:
        UserError: the checkpoint is another model's, or its state cannot be divided anew.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    wrapper = engine.optimizer if engine is not None else optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    if hasattr(wrapper, "checkpoint_event_prologue"):
        wrapper.checkpoint_event_prologue()
    if getattr(wrapper, "round_robin_gradients", False):
        raise UserError(f"{checkpoint}: {ROUND_ROBIN}")
    groups = _layout(wrapper, names)
    order = [span.name for group in groups for _, spans in group for span in spans]
    saved = read_states(checkpoint, order)
    _check(saved, groups, checkpoint)
    with torch.no_grad():
        for group, options in zip(groups, inner.param_groups, strict=True):
            for flat, spans in group:
                _fill(flat, spans, saved, inner, options)
        for name, buffer in model.named_buffers():
            if name in saved.buffers:
                buffer.copy_(saved.buffers[name])
    _spread(wrapper)
    numbers = [saved.groups[spans[0].name] if (spans := [s for _, each in group for s in each]) else 0 for group in groups]
    _schedule(scheduler, getattr(engine, "lr_scheduler", None), inner, saved, numbers, checkpoint)
    if engine is not None:
        _count(engine, wrapper, saved, step)


def _layout(wrapper: Any, names: dict[int, str]) -> list[_Group]:
    """How each kind of optimizer lays parameters out on this rank."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _zero3(wrapper, names)
    params = getattr(wrapper, "bit16_groups", None) or getattr(wrapper, "bf16_groups", None)
    if params is not None:
        flats = [group["params"][0] for group in wrapper.optimizer.param_groups]
        return [[(flat, list(_mapped(group, names)))] for flat, group in zip(flats, params, strict=True)]
    if any(id(p) not in names for group in wrapper.param_groups for p in group["params"]):
        raise UserError(WRAPPED)
    return [
        [(p, [_Span(names[id(p)], p.numel(), 0, p.numel(), 0)]) for p in group["params"]] for group in wrapper.param_groups
    ]


def _mapped(group: list[torch.Tensor], names: dict[int, str]) -> Iterator[_Span]:
    """ZeRO-1 and 2: the group is one long tensor, and each rank has an equal part of it."""
    for param in group:
        mapping = param._hp_mapping
        part = mapping.lp_fragment_address if mapping else None
        offset = mapping.get_hp_fragment_address().start if mapping else 0
        yield _Span(names[id(param)], param.numel(), part.start if part else 0, part.numel if part else 0, offset)


def _zero3(wrapper: Any, names: dict[int, str]) -> list[_Group]:
    """ZeRO-3: each parameter is divided among the ranks; a group is cut into sub groups of some size."""
    rank, world = (f(group=wrapper.dp_process_group) for f in (torch.distributed.get_rank, torch.distributed.get_world_size))
    groups: list[_Group] = [[] for _ in wrapper.optimizer.param_groups]
    for number, params in enumerate(wrapper.fp16_groups):
        spans, offset = [], 0
        for param in params:
            share = math.ceil(param.ds_numel / world)
            start = min(rank * share, param.ds_numel)
            spans.append(_Span(names[id(param)], param.ds_numel, start, min(share, param.ds_numel - start), offset))
            offset += share
        groups[wrapper.sub_group_to_group_id[number]].append((wrapper.fp32_partitioned_groups_flat[number], spans))
    return groups


def _check(saved: CheckpointStates, groups: list[_Group], checkpoint: Path) -> None:
    spans = {span.name: span for group in groups for _, each in group for span in each}
    for name, span in spans.items():
        if saved.numel(name) != span.numel:
            raise UserError(
                f"{checkpoint} has {saved.numel(name):,} elements of {name}, and this run's model {span.numel:,}: it was "
                "written by another model"
            )
    more = sorted(set(saved.fragments) - set(spans))
    if more:
        raise UserError(f"{checkpoint} has trained {more[0]}, which this run does not train: it was written by another run")


def _fill(
    flat: torch.Tensor, spans: list[_Span], saved: CheckpointStates, inner: torch.optim.Optimizer, options: dict
) -> None:
    """One tensor that the optimizer steps, and its state."""
    if not spans:
        return
    state: dict[str, Any] = {}
    for key in saved.keys(spans[0].name):
        target = flat.data.view(-1) if key == WEIGHT else torch.zeros_like(flat).view(-1)
        for span in spans:
            if span.length:
                target[span.offset : span.offset + span.length] = saved.piece(
                    span.name, key, span.start, span.start + span.length
                ).to(target.device, target.dtype)
        if key != WEIGHT:
            state[key] = target.view_as(flat)
    step = saved.steps[spans[0].name]
    if type(inner).__module__.startswith("torch."):
        there = flat.device if options.get("fused") or options.get("capturable") else "cpu"
        state["step"] = torch.tensor(step, dtype=torch.float32, device=there)
    else:  # DeepSpeed's own optimizers hand it to C++
        state["step"] = int(step)
    inner.state[flat] = state


def _spread(wrapper: Any) -> None:
    """The optimizer's full-precision values into the weights that the model computes with."""
    if hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    if not hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return
    for number, flat in enumerate(wrapper.fp16_partitioned_groups_flat):
        flat.data.copy_(wrapper.fp32_partitioned_groups_flat[number].data)
        parts = wrapper.fp16_partitioned_groups[number]
        for part, values in zip(parts, wrapper.unflatten(flat, parts), strict=True):
            part.data = values.data
    if wrapper.persistent_parameters:
        wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
    wrapper.checkpoint_event_epilogue()


def _schedule(
    scheduler: Any,
    of_engine: Any,
    inner: torch.optim.Optimizer,
    saved: CheckpointStates,
    numbers: list[int],
    checkpoint: Path,
) -> None:
    """The scheduler's position and the learning rates that it had set; `numbers`: each group's in the checkpoint."""
    file = checkpoint / "scheduler.pt"
    state = saved.engine.get("lr_scheduler")
    if file.is_file():
        state = torch.load(file, weights_only=True)
    elif of_engine is not None and state:
        scheduler = of_engine
    else:
        raise UserError(
            f"{checkpoint} holds the schedule of a ZeRO JSON's scheduler block, which this run has not: resume with it"
        )
    by_group = {key: value for key, value in state.items() if isinstance(value, list) and len(value) == len(saved.rates)}
    scheduler.load_state_dict(state | {key: [value[n] for n in numbers] for key, value in by_group.items()})
    for group, number in zip(inner.param_groups, numbers, strict=True):
        group["lr"] = saved.rates[number]


def _count(engine: Any, wrapper: Any, saved: CheckpointStates, step: int) -> None:
    told = {"global_steps": step, "global_samples": step * engine.train_batch_size(), "skipped_steps": 0} | saved.engine
    for counter in COUNTERS:
        setattr(engine, counter, told[counter])
    scaler = getattr(wrapper, "loss_scaler", None)
    if scaler is not None:
        vars(scaler).update({key: value for key, value in told.get("loss_scaler", {}).items() if key in vars(scaler)})
