"""Which undocumented parts of DeepSpeed are used, and why: this is the only module that touches them.

They were read in the versions of READ_IN. tests/zero/test_internals.py compares SURFACE with the installed packages, so
that a release that renames one fails there, by name, and not in the middle of a run. It imports DeepSpeed only inside
functions: a run of plain PyTorch works without it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

READ_IN = {"deepspeed": "0.19.8", "accelerate": "1.15.0", "transformers": "5.23.0"}


@dataclass(frozen=True)
class Part:
    """One undocumented attribute or function of another package."""

    owner: str
    """Module, or module:Class."""
    name: str
    why: str
    signature: str | None = None
    """Of a function, as inspect.signature prints it; None for an attribute that the owner assigns."""


_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_ZERO12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
_PARAMETERS = "deepspeed.runtime.zero.partition_parameters"
_FRAGMENT = "deepspeed.utils.tensor_fragment:tensor_fragment"

SURFACE = (
    Part(_ENGINE, "clip_fp32_gradients", "ZeRO-0 in fp32 drops the gradient norm that clipping computes", "(self)"),
    Part(_ENGINE, "_global_grad_norm", "where get_global_grad_norm() reads that norm"),
    Part(_ENGINE, "checkpoint_engine", "its writer's errors are collected: raised at once, they would block other ranks"),
    Part(_ENGINE, "global_steps", "counter that resharding restores"),
    Part(_ENGINE, "global_samples", "counter that resharding restores"),
    Part(_ENGINE, "skipped_steps", "counter that resharding restores"),
    Part(_ZERO12, "bit16_groups", "which parameters form a flat group of ZeRO-1 and 2"),
    Part(_ZERO12, "averaged_gradients", "gradients between backward and update, for the audit of shards"),
    Part(_ZERO12, "loss_scaler", "fp16's state, which resharding restores"),
    Part(_ZERO12, "update_lp_params", "copies fp32 values into the weights that the model computes with", "(self)"),
    Part(_BF16, "bf16_groups", "the same groups, where bf16 gradients are accumulated in fp32"),
    Part(_BF16, "update_lp_params", "the same copy for that optimizer", "(self)"),
    Part(_FRAGMENT, "lp_fragment_address", "which elements of a parameter this rank updates"),
    Part(_FRAGMENT, "get_hp_fragment_address", "where they begin in the flat group", "(self)"),
    Part("deepspeed.runtime.bf16_optimizer", "_hp_mapping", "the attribute of a parameter that holds its fragment"),
    Part(_ZERO3, "fp16_groups", "which parameters form a sub group"),
    Part(_ZERO3, "fp32_partitioned_groups_flat", "this rank's fp32 values of a sub group"),
    Part(_ZERO3, "sub_group_to_group_id", "to which parameter group of the optimizer a sub group belongs"),
    Part(_ZERO3, "grad_partitions_flat_buffer", "this rank's gradients, for the audit of shards"),
    Part(_ZERO3, "loss_scaler", "fp16's state, which resharding restores"),
    Part(_ZERO3, "checkpoint_event_prologue", "shards gathered parameters again before they are overwritten", "(self)"),
    Part(_ZERO3, "checkpoint_event_epilogue", "gathers small parameters again afterwards", "(self)"),
    Part(_PARAMETERS, "ds_tensor", "this rank's shard of a parameter"),
    Part(_PARAMETERS, "ds_numel", "elements of the full parameter"),
    Part(_PARAMETERS, "ds_shape", "shape of the full parameter"),
    Part("deepspeed.ops", "__compatible_ops__", "its first use compiles test programs of all operations: seconds"),
    Part(
        "deepspeed.runtime.zero.muon.original_muon",
        "zeropower_via_newtonschulz5",
        "torch.compile decorates it, whose import costs 1.2 to 1.8 s of each start",
        "(G, steps: int)",
    ),
    Part(
        "transformers.integrations.deepspeed:HfTrainerDeepSpeedConfig",
        "fill_match",
        "zero/blocks.py overrides it to keep the step counts that a ZeRO JSON fixes",
        "(self, ds_key_long, hf_val, hf_key=None, must_match=True)",
    ),
    Part(
        "accelerate.utils.dataclasses:DeepSpeedPlugin",
        "deepspeed_config",
        "the configuration that the engine was started with, for ds_config.json",
    ),
)


# ---- parameters ----


def full_numel(parameter: torch.Tensor) -> int:
    """Elements of a parameter, also where ZeRO-3 keeps only a shard of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of a parameter, also where ZeRO-3 keeps only a shard of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, flat and padded under ZeRO-3; all of it otherwise."""
    return getattr(parameter, "ds_tensor", parameter.data)


# ---- before the engine ----


def skip_operation_probe() -> None:
    """Declare DeepSpeed's shared-memory operation of CPU collectives unavailable, before DeepSpeed probes for it.

    DeepSpeed would compile it at first use, while gloo does the same work. Set before it is read, this also saves the
    probe of all other operations, which starts a compiler.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer, as every start of ZeRO does, without the torch.compile that decorates it.

    That would import torch's whole compiler: 1.2 to 1.8 s of each start (benchmarks/README.md), for an optimizer that
    the run does not use.
    """
    compiler: Any = torch.compile
    replaced: Any = torch

    def leave_uncompiled(function: Any = None, **options: Any) -> Any:
        return function or (lambda decorated: decorated)

    replaced.compile = leave_uncompiled
    try:
        # Other versions have no such module.
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        replaced.compile = compiler


# ---- the engine ----


def report_gradient_norm(engine: Any) -> None:
    """Let ZeRO-0 in fp32 report its gradient norm, which the engine computes for clipping and drops."""

    def clip() -> None:
        engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    if engine.zero_optimization_stage() == 0 and not (engine.fp16_enabled() or engine.bfloat16_enabled()):
        engine.clip_fp32_gradients = clip


def file_writer(model: Any) -> Any | None:
    """The object whose `save` writes an engine's checkpoint files; None for a model without an engine."""
    return getattr(model, "checkpoint_engine", None)


def engine_config(accelerator: Any) -> dict[str, Any]:
    """The ZeRO JSON that accelerate started the engine with, as its values were filled in."""
    return accelerator.state.deepspeed_plugin.deepspeed_config


def set_counters(engine: Any, values: dict[str, int]) -> None:
    """Set global_steps, global_samples and skipped_steps of an engine."""
    for name, value in values.items():
        setattr(engine, name, value)


def set_loss_scaler(optimizer: Any, values: dict[str, Any]) -> None:
    """Set the fields of an fp16 loss scaler; another optimizer has none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None:
        vars(scaler).update({key: value for key, value in values.items() if key in vars(scaler)})


# ---- the optimizer ----


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that steps, inside DeepSpeed's or accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def gradient_buffers(optimizer: Any) -> list[Any]:
    """Gradients that DeepSpeed's optimizer holds between backward and update, other than the parameters' own `grad`."""
    if _is_zero3(optimizer):
        # averaged_gradients are views of this buffer.
        return [optimizer.grad_partitions_flat_buffer]
    return [getattr(optimizer, "averaged_gradients", None)]


@dataclass
class Span:
    """Where this rank's piece of a parameter lies in a flat tensor of the optimizer."""

    name: str
    numel: int
    """Elements of the full parameter."""
    start: int
    """First element of the piece in the parameter."""
    length: int
    offset: int
    """Where the piece begins in the flat tensor."""


FlatGroup = list[tuple[torch.Tensor, list[Span]]]
"""The tensors that an optimizer steps for one group of parameters, each with the pieces in it."""


def _is_zero3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def flat_groups(optimizer: Any, names: dict[int, str]) -> list[FlatGroup] | None:
    """How an optimizer lays parameters out on this rank; None where its tensors are copies that nothing maps.

    Args:
        optimizer: DeepSpeed's, or torch's own.
        names: id of a parameter -> its name.
    """
    if _is_zero3(optimizer):
        return _zero3_groups(optimizer, names)
    grouped = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", None)
    if grouped is not None:
        flats = [group["params"][0] for group in optimizer.optimizer.param_groups]
        return [[(flat, list(_fragments(group, names)))] for flat, group in zip(flats, grouped, strict=True)]
    groups: list[FlatGroup] = []
    for group in optimizer.param_groups:
        # ZeRO-0 in 16 bits steps fp32 copies, which have no names.
        if any(id(parameter) not in names for parameter in group["params"]):
            return None
        groups.append([(p, [Span(names[id(p)], p.numel(), 0, p.numel(), 0)]) for p in group["params"]])
    return groups


def _fragments(group: list[Any], names: dict[int, str]) -> Iterator[Span]:
    """ZeRO-1 and 2: a group is one long tensor, of which each rank updates an equal part."""
    for parameter in group:
        name, numel, mapping = names[id(parameter)], parameter.numel(), parameter._hp_mapping
        # None: all of it belongs to other ranks.
        if mapping is None:
            yield Span(name, numel, 0, 0, 0)
            continue
        piece = mapping.lp_fragment_address
        yield Span(name, numel, piece.start, piece.numel, mapping.get_hp_fragment_address().start)


def _zero3_groups(optimizer: Any, names: dict[int, str]) -> list[FlatGroup]:
    """ZeRO-3: each parameter is sharded over all ranks; a group is cut into sub groups of some size."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups: list[FlatGroup] = [[] for _ in optimizer.optimizer.param_groups]
    for number, parameters in enumerate(optimizer.fp16_groups):
        spans, offset = [], 0
        for parameter in parameters:
            numel = parameter.ds_numel
            # The last ranks' shards are padded to the same length.
            share = math.ceil(numel / world)
            start = min(rank * share, numel)
            spans.append(Span(names[id(parameter)], numel, start, min(share, numel - start), offset))
            offset += share
        groups[optimizer.sub_group_to_group_id[number]].append((optimizer.fp32_partitioned_groups_flat[number], spans))
    return groups


def shard_parameters(optimizer: Any) -> None:
    """Shard what ZeRO-3 has gathered, before shards are overwritten; a collective call."""
    if _is_zero3(optimizer):
        optimizer.checkpoint_event_prologue()


def update_weights(optimizer: Any) -> None:
    """Copy the optimizer's fp32 values into the weights that the model computes with; a collective call."""
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    if _is_zero3(optimizer):
        for number, parameters in enumerate(optimizer.fp16_groups):
            offset, values = 0, optimizer.fp32_partitioned_groups_flat[number].data
            for parameter in parameters:
                shard = parameter.ds_tensor.data
                shard.copy_(values[offset : offset + shard.numel()])
                offset += shard.numel()
        optimizer.checkpoint_event_epilogue()
