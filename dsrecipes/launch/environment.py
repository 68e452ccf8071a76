"""Which environment variables tell a process its rank, and which of a launcher's settings are refused."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from dsrecipes.errors import UserError
from dsrecipes.launch.task_ranks import adopt_ranks

START_TIME = "DSRECIPES_BEGAN"
"""Set by `dsrecipes train`: seconds since the epoch at the first start of the ranks, unchanged by restarts."""
RUN_FOLDER_FILE = "DSRECIPES_LAUNCHER"
"""Set by `dsrecipes train` for the ranks that it starts: a file in which rank 0 names the run folder."""
LAUNCH_LINES = (
    "`dsrecipes train RECIPE --procs N`, `torchrun --nproc_per_node N -m dsrecipes.run --recipe RECIPE`, "
    "or `accelerate launch --use_deepspeed --num_processes N -m dsrecipes.run --recipe RECIPE`"
)
RANK_KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEVICE_KEYS = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
_ACCELERATE_KEYS = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_CONFIG_DS_FIELDS",
)
_ZERO_FLAGS = ("--zero_stage", "--deepspeed_config_file", "--offload_optimizer_device", "--offload_param_device")
"""Flags of `accelerate launch` that set ZeRO."""
_MAX_PARENTS = 5


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    local_rank: int
    world: int
    """Number of processes."""
    local_world: int
    """Number of processes on this machine."""


@dataclass(frozen=True)
class Launch:
    """What the accelerate command requests in addition to ranks."""

    deepspeed: bool
    use_cpu: bool
    precision: str | None
    """bf16, fp16, or None where accelerate sets none of them."""


def _is_on(env: MutableMapping[str, str], key: str) -> bool:
    return env.get(key, "").lower() in ("true", "1", "yes")


def read_launch(env: MutableMapping[str, str], zero: Path | None = None) -> Launch:
    """Read accelerate's variables and remove them, because they override Trainer's configuration.

    Args:
        zero: the ZeRO JSON of the run, for the message when accelerate's configuration sets ZeRO too.

    Raises:
        UserError: accelerate's configuration sets ZeRO too, or FSDP, or it started one process of several; or srun or
            mpirun started several that cannot find each other.
    """
    adopt_ranks(env)
    if "MASTER_PORT" in env and "RANK" not in env:
        raise UserError(
            "DSR300",
            "MASTER_PORT is set but RANK is not: `accelerate launch` was asked for several processes and started one "
            f"(it does so with --cpu), or MASTER_PORT was left over (unset it). Start the ranks with {LAUNCH_LINES}",
        )
    if _is_on(env, "ACCELERATE_USE_FSDP"):
        raise UserError(
            "DSR301",
            "the accelerate configuration turns FSDP on, but here ZeRO shards the model. Use an accelerate configuration "
            "without FSDP",
        )
    precision = env.get("ACCELERATE_MIXED_PRECISION")
    launch = Launch(
        deepspeed=_is_on(env, "ACCELERATE_USE_DEEPSPEED"),
        use_cpu=_is_on(env, "ACCELERATE_USE_CPU"),
        precision=precision if precision in ("bf16", "fp16") else None,
    )
    if launch.deepspeed:
        _refuse_second_owner(env, zero)
    # Trainer would read them, and let accelerate's precision and DeepSpeed win over the flags
    for key in list(env):
        if key in _ACCELERATE_KEYS or key.startswith("ACCELERATE_DEEPSPEED_"):
            del env[key]
    return launch


def _refuse_second_owner(env: MutableMapping[str, str], zero: Path | None) -> None:
    """Refuse ZeRO settings of accelerate, since --deepspeed sets them (UserError)."""
    json_file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    # accelerate lists mixed_precision for every configuration that names a precision
    fields = env.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    fields = [field for field in fields if field not in ("", "none", "mixed_precision")]
    command = _accelerate_command()
    flags = [word for word in command if word.split("=")[0] in _ZERO_FLAGS]
    if fields:
        owner = f"the accelerate configuration {_accelerate_config(command)} ({', '.join(fields)})"
    elif json_file.lower() != "none":
        owner = f"accelerate's DeepSpeed file {json_file}"
    elif flags:
        owner = f"the `accelerate launch` command ({' '.join(flags)})"
    else:
        return
    raise UserError(
        "DSR302",
        f"two owners of ZeRO: {owner} and --deepspeed {zero or 'none'} both set it. Keep --deepspeed, and take "
        "deepspeed_config out of the accelerate configuration (`accelerate launch --use_deepspeed` alone is fine)",
    )


def _accelerate_command() -> list[str]:
    """The words of the `accelerate launch` that started this process, found through /proc; empty where there is none."""
    pid = os.getppid()
    for _ in range(_MAX_PARENTS):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            # proc(5): the name in parentheses may hold spaces and parentheses, so fields are counted from the last one
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            return []
        if any("accelerate" in Path(word).name for word in words[:4]) and "launch" in words:
            # after -m come the flags of the program that it launches
            end = next((i for i, word in enumerate(words) if word in ("-m", "--module")), len(words))
            return words[:end]
    return []


def _accelerate_config(command: list[str]) -> str:
    """The configuration file that an `accelerate launch` command reads."""
    for index, word in enumerate(command):
        if word == "--config_file" and index + 1 < len(command):
            return command[index + 1]
        if word.startswith("--config_file="):
            return word.partition("=")[2]
    # here, because it is read for an error message only, and imports torch
    from accelerate.commands.config.config_args import default_config_file

    return str(default_config_file)


def complete_ranks(env: MutableMapping[str, str]) -> Ranks:
    """Set the variables that a launcher left out; without a launcher: one rank and a free port.

    DeepSpeed would look for MPI where any of them is missing.
    """
    adopt_ranks(env)
    if "RANK" not in env:
        # leftovers of another launcher would be taken for a part of this group
        for key in RANK_KEYS:
            env.pop(key, None)
        with socket.socket() as probe:
            # the port is free again when the process group binds it; the gap is short, and only this machine is concerned
            probe.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(probe.getsockname()[1])
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", env["RANK"])
    # the deepspeed launcher names it LOCAL_SIZE
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    return Ranks(
        rank=int(env["RANK"]),
        local_rank=int(env["LOCAL_RANK"]),
        world=int(env["WORLD_SIZE"]),
        local_world=int(env["LOCAL_WORLD_SIZE"]),
    )


def retain_freed_memory() -> None:
    """Keep the memory that a step frees in this process: glibc returns large blocks to the kernel at once otherwise.

    The kernel clears each page that a step touches again. On two cores and a vocabulary of 49,152 tokens that took a
    seventh of the step (benchmarks/README.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        largest = 2**31 - 1
        libc.mallopt(-3, largest)  # M_MMAP_THRESHOLD, malloc.h: no block gets a mapping of its own
        libc.mallopt(-1, largest)  # M_TRIM_THRESHOLD: the heap does not shrink


def hide_accelerators() -> None:
    """Make `--use_cpu` apply to DeepSpeed too; must precede the first CUDA call."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"
