"""The process DeepSpeed runs in: ranks as the launcher made them, a probe, and small corrections of the engine."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import torch

from dsrecipes.errors import UserError
from dsrecipes.launch.environment import LAUNCH_LINES, RANK_KEYS, Ranks

_MINIMUM = (0, 19, 4)


def set_threads(ranks: Ranks, env: MutableMapping[str, str]) -> None:
    """Divide the cores among this machine's ranks, unless OMP_NUM_THREADS says more than launchers' default of 1."""
    if int(env.get("OMP_NUM_THREADS") or 0) > 1:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // ranks.local_world))


def computes_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers in hardware (AVX-512 BF16)."""
    supported = getattr(
        torch.cpu, "_is_avx512_bf16_supported", None
    )  # private in torch 2.13, which has no public way to ask
    return bool(supported and supported())


def describe_hardware(device: str) -> str:
    """What rounding depends on: the GPU, or the CPU's instruction set and the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu":
        return device
    kind = torch.backends.cpu.get_cpu_capability() + (" BF16" if computes_bf16() else "")
    return f"a CPU ({kind}, {torch.get_num_threads()} threads)"


def probe_deepspeed(nvme: bool) -> str | None:
    """Why DeepSpeed cannot start here, or None. Nothing is started by asking."""
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "deepspeed is not installed"
    try:
        import deepspeed
    except Exception as error:
        sys.modules["deepspeed"] = None  # type: ignore[assignment]  # or accelerate imports it again, and fails
        return f"deepspeed {version} does not import ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit()) < _MINIMUM:
        return (
            f"deepspeed {version} is older than {'.'.join(map(str, _MINIMUM))}, whose ZeRO-2 accumulates gradients rightly"
        )
    # On CPU DeepSpeed compiles a shared-memory operation at first use; without it gloo does the same work. Set before it
    # is read, it also saves a probe of all operations, which starts a compiler.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if nvme:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                "NVMe offload needs libaio and its headers (Debian and Ubuntu: apt install libaio-dev) and a C++ compiler"
            )
    return None


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer, as each start of ZeRO does, without the torch.compile that decorates it.

    That would import torch's whole compiler: 1.2 to 1.8 s of each start (benchmarks/README.md), for an optimizer that
    the run does not use.
    """
    compiler, torch.compile = torch.compile, lambda function=None, **options: function or (lambda each: each)
    try:
        with contextlib.suppress(ImportError):  # other versions have no such module
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiler


def use_single_process(device: str) -> None:
    """Let Trainer train a single rank of plain PyTorch without a process group or DDP, and on one device of several."""
    for key in RANK_KEYS:
        os.environ.pop(key, None)
    if device == "cuda":
        # else Trainer would split each batch among all devices (DataParallel)
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def report_gradient_norm(engine: Any) -> None:
    """Let ZeRO-0 in fp32 report its gradient norm, which the engine computes for clipping and drops."""

    def clip() -> None:
        engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    if engine.zero_optimization_stage() == 0 and not (engine.fp16_enabled() or engine.bfloat16_enabled()):
        engine.clip_fp32_gradients = clip


def end_process_group() -> None:
    """Take the ranks apart in order; a gloo rank that just exits may be aborted."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_started(asked_stage: int | None, ranks: Ranks, args: Any) -> None:
    """Compare ranks, engine and device with what was asked for.

    Raises:
        UserError: they differ; names the lines that start what was asked for.
    """
    from accelerate.utils import DistributedType

    engine = args.distributed_state.distributed_type == DistributedType.DEEPSPEED
    started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if started != ranks.world or args.world_size != ranks.world or engine != (asked_stage is not None):
        raise UserError(
            f"asked for {ranks.world} ranks {'with' if asked_stage is not None else 'without'} DeepSpeed, but {started} "
            f"{'with' if engine else 'without'} it came to be. Start them with {LAUNCH_LINES}"
        )
