"""The variables by which launchers tell a process its rank."""

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
"""Set by `dsrecipes train`: seconds of the epoch at the first start of the ranks, which starts after a failure keep."""


RUN_FOLDER_FILE = "DSRECIPES_LAUNCHER"
"""Set by `dsrecipes train` for the ranks that it starts: a file in which rank 0 names the run folder."""


LAUNCH_LINES = (
    "`dsrecipes train RECIPE --procs N`, `torchrun --nproc_per_node N -m dsrecipes.run --recipe RECIPE`, "
    "or `accelerate launch --use_deepspeed --num_processes N -m dsrecipes.run --recipe RECIPE`"
)


RANK_KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


DEVICE_KEYS = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    local_rank: int
    world: int
    local_world: int


@dataclass(frozen=True)
class Launch:
    """What the launcher asked for beside ranks."""

    deepspeed: bool
    use_cpu: bool
    precision: str | None


def _on(env: MutableMapping[str, str], key: str) -> bool:
    return env.get(key, "").lower() in ("true", "1", "yes")


def read_launch(env: MutableMapping[str, str], zero: Path | None = None) -> Launch:
    """Read accelerate's variables and take them out, for they change Trainer behind the configuration's back.

    Args:
        zero: the ZeRO JSON of the run, for the message when accelerate's configuration sets ZeRO too.

    Raises:
        UserError: accelerate's configuration sets ZeRO too, or FSDP, or it started one process of several; or srun or
            mpirun started several that cannot find each other.
    """
    adopt_ranks(env)
    if "MASTER_PORT" in env and "RANK" not in env:
        raise UserError(
            "MASTER_PORT is set but RANK is not: `accelerate launch` was asked for several processes and started one "
            f"(it does so with --cpu), or MASTER_PORT was left over (unset it). Start the ranks with {LAUNCH_LINES}"
        )
    if _on(env, "ACCELERATE_USE_FSDP"):
        raise UserError(
            "the accelerate configuration turns FSDP on; here ZeRO divides the model. Use an accelerate configuration without FSDP"
        )
    launch = Launch(
        deepspeed=_on(env, "ACCELERATE_USE_DEEPSPEED"),
        use_cpu=_on(env, "ACCELERATE_USE_CPU"),
        precision=env.get("ACCELERATE_MIXED_PRECISION")
        if env.get("ACCELERATE_MIXED_PRECISION") in ("bf16", "fp16")
        else None,
    )
    if launch.deepspeed:
        _refuse_second_owner(env, zero)
    for key in list(env):
        if key in (
            "ACCELERATE_USE_DEEPSPEED",
            "ACCELERATE_USE_CPU",
            "ACCELERATE_MIXED_PRECISION",
            "ACCELERATE_CONFIG_DS_FIELDS",
        ) or key.startswith("ACCELERATE_DEEPSPEED_"):
            del env[key]
    return launch


def _refuse_second_owner(env: MutableMapping[str, str], zero: Path | None) -> None:
    json_file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    # mixed_precision stands there for any accelerate configuration that names a precision
    fields = env.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    in_config = [field for field in fields if field not in ("", "none", "mixed_precision")]
    words = _accelerate_command()
    by_flag = [
        word
        for word in words
        if word.split("=")[0]
        in ("--zero_stage", "--deepspeed_config_file", "--offload_optimizer_device", "--offload_param_device")
    ]
    if json_file.lower() == "none" and not in_config and not by_flag:
        return
    if in_config:
        what = f"the accelerate configuration {_accelerate_config(words)} ({', '.join(in_config)})"
    elif json_file.lower() != "none":
        what = f"accelerate's DeepSpeed file {json_file}"
    else:
        what = f"the `accelerate launch` command ({' '.join(by_flag)})"
    raise UserError(
        f"two owners of ZeRO: {what} and --deepspeed {zero or 'none'} both set it. Keep --deepspeed, and take "
        "deepspeed_config out of the accelerate configuration (`accelerate launch --use_deepspeed` alone is fine)"
    )


def _accelerate_command() -> list[str]:
    """The words of the `accelerate launch` that started this process, as far as /proc tells."""
    pid = os.getppid()
    for _ in range(5):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            return []
        if any("accelerate" in Path(word).name for word in words[:4]) and "launch" in words:
            cut = next((i for i, word in enumerate(words) if word in ("-m", "--module")), len(words))
            return words[:cut]
    return []


def _accelerate_config(words: list[str]) -> str:
    for index, word in enumerate(words):
        if word == "--config_file" and index + 1 < len(words):
            return words[index + 1]
        if word.startswith("--config_file="):
            return word.partition("=")[2]
    from accelerate.commands.config.config_args import default_config_file

    return str(default_config_file)


def complete_ranks(env: MutableMapping[str, str]) -> Ranks:
    """Fill in what a launcher left out (no launcher: one rank and a free port), so that nobody looks for MPI."""
    adopt_ranks(env)
    if "RANK" not in env:
        for key in RANK_KEYS:
            env.pop(key, None)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(probe.getsockname()[1])
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", env["RANK"])
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))  # LOCAL_SIZE: the deepspeed launcher
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    return Ranks(*(int(env[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


def retain_freed_memory() -> None:
    """Let this process keep the memory that a step gives back: glibc's, which returns large blocks at once otherwise.

    The kernel clears each page again that a step touches first. On two cores and a vocabulary of 49,152 tokens that was
    a seventh of the step (benchmarks/README.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        largest = 2**31 - 1
        libc.mallopt(-3, largest)  # M_MMAP_THRESHOLD, malloc.h: no block gets a mapping of its own
        libc.mallopt(-1, largest)  # M_TRIM_THRESHOLD: the heap does not shrink


def hide_accelerators() -> None:
    """Make `--use_cpu` hold for DeepSpeed too; must come before the first CUDA call."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"
