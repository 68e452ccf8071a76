"""How the process is prepared for DeepSpeed or plain PyTorch, and whether what started is what was requested."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import torch

from dsrecipes.errors import UserError, plural
from dsrecipes.launch.environment import LAUNCH_LINES, RANK_KEYS, Ranks
from dsrecipes.zero.internals import skip_operation_probe

_MINIMUM = (0, 19, 4)
"""The first DeepSpeed whose ZeRO-2 accumulates gradients correctly."""


def set_threads(ranks: Ranks, env: MutableMapping[str, str]) -> None:
    """Divide the cores among this machine's ranks, unless OMP_NUM_THREADS is above 1, the default of launchers."""
    if int(env.get("OMP_NUM_THREADS") or 0) > 1:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // ranks.local_world))


def computes_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers in hardware (AVX-512 BF16)."""
    # torch 2.13 has no public function for it.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def describe_hardware(device: str) -> str:
    """What rounding depends on: the GPU, or the CPU's instruction set and the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu":
        return device
    instructions = torch.backends.cpu.get_cpu_capability() + (" BF16" if computes_bf16() else "")
    return f"a CPU ({instructions}, {torch.get_num_threads()} threads)"


def probe_deepspeed(nvme: bool) -> str | None:
    """Why DeepSpeed cannot start here, or None; nothing is started.

    Args:
        nvme: whether the ZeRO JSON offloads to NVMe, which needs a library and a compiler.

    Raises:
        UserError: NVMe offload is requested and cannot work.
    """
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "deepspeed is not installed"
    try:
        import deepspeed  # noqa: F401 (whether it imports is the question)
    except Exception as error:
        modules: dict[str, Any] = sys.modules
        # None ends a later import at once; accelerate would import it again, and fail.
        modules["deepspeed"] = None
        reason = str(error).splitlines()[0] if str(error) else ""
        return f"deepspeed {version} does not import ({type(error).__name__}: {reason})"
    # A local build has a suffix, such as 0.19.8+1a2b3c.
    numbers = version.split("+")[0].split(".")[:3]
    if tuple(int(number) for number in numbers if number.isdigit()) < _MINIMUM:
        minimum = ".".join(map(str, _MINIMUM))
        return f"deepspeed {version} is older than {minimum}, whose ZeRO-2 accumulates gradients correctly"
    skip_operation_probe()
    if nvme:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                "DSR270",
                "NVMe offload needs libaio and its headers (Debian and Ubuntu: apt install libaio-dev) and a C++ compiler",
            )
    return None


def use_single_process(device: str) -> None:
    """Have Trainer train a single rank of plain PyTorch without a process group or DDP, on one device."""
    for key in RANK_KEYS:
        os.environ.pop(key, None)
    if device == "cuda":
        # With several visible devices Trainer would split each batch among them (DataParallel).
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def end_process_group() -> None:
    """Destroy the process group in an orderly way; a gloo rank that just exits may be aborted."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_started(requested_stage: int | None, ranks: Ranks, args: Any) -> None:
    """Compare the ranks and the engine that started with the requested ones.

    Args:
        requested_stage: of ZeRO; None for plain PyTorch.
        args: Trainer's arguments.

    Raises:
        UserError: they differ; names the commands that start what was requested.
    """
    from accelerate.utils import DistributedType

    wants_engine = requested_stage is not None
    has_engine = args.distributed_state.distributed_type == DistributedType.DEEPSPEED
    started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    # accelerate can start fewer ranks, or no engine, than were requested, without an error.
    if started == ranks.world == args.world_size and has_engine == wants_engine:
        return
    raise UserError(
        "DSR271",
        f"Requested {plural(ranks.world, 'rank')} {_with(wants_engine)}, but {plural(started, 'rank')} {_with(has_engine)} "
        f"started. Start them with {LAUNCH_LINES}",
    )


def _with(engine: bool) -> str:
    return "with DeepSpeed" if engine else "without DeepSpeed"
