"""What this machine, or this number of ranks, cannot do: refused before anything is started."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch

from dsrecipes.errors import UserError, plural
from dsrecipes.io.devices import listed_accelerators

_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
"""Keys of ZeRO++ that need DeepSpeed's CUDA kernels."""


def check_accelerators() -> None:
    """Refuse to fall back to the CPU where the driver lists a GPU that torch cannot use (UserError)."""
    count = listed_accelerators()
    if not count:
        return
    raise UserError(
        f"the driver ({_driver()}) lists {plural(count, 'GPU')}, but torch {torch.__version__} ({_build()}) cannot use "
        f"{'them' if count > 1 else 'it'}: {_why_unusable()}. Install a torch built for this driver "
        "(https://pytorch.org/get-started/locally) or a newer driver; --use_cpu true trains on the CPU"
    )


def _build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return f"built for ROCm {hip}" if hip else "built without CUDA or ROCm"


def _driver() -> str:
    """The driver and its version, as nvidia-smi reports it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "version unknown"
    version = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", answer)
    return f"NVIDIA {version[0]}" if version else "version unknown"


def _why_unusable() -> str:
    """torch's own reason, and what CUDA_VISIBLE_DEVICES has to do with it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = (
        f"CUDA_VISIBLE_DEVICES is {visible!r}, which may name no GPU of this machine (`nvidia-smi -L`); " if visible else ""
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f"{chosen}{str(error).strip().splitlines()[0].rstrip('.')}"
    return f"{chosen}torch.cuda.is_available() is False"


def check_precision(stage: int, precision: str, chosen: bool) -> None:
    """Refuse fp16 at stage 0 (UserError): DeepSpeed divides its gradients by a loss scale that it never applied.

    Only ZeRO's own optimizers scale the loss (engine.py of 0.19, scale_if_loss), and stage 0 has another one.

    Args:
        stage: of ZeRO.
        precision: of the run.
        chosen: whether the user asked for fp16; else it is the default on this GPU.
    """
    if stage != 0 or precision != "fp16":
        return
    why = "" if chosen else ", which is the default on this GPU, as it has no bf16"
    raise UserError(
        f"stage 0 of DeepSpeed in fp16{why}: it divides the gradients by a loss scale that was never applied, so nothing is "
        "learned. Give --deepspeed zero1 (or none), or --fp16 false for fp32"
    )


def check_zeropp(path: Path, section: dict[str, Any], world: int, device: str) -> None:
    """Refuse what ZeRO++ cannot do on this device or with this number of ranks.

    Args:
        path: of the ZeRO JSON, for the message.
        section: its zero_optimization.
        world: number of ranks.
        device: cpu, cuda, ...

    Raises:
        UserError: names each key and what to do.
    """
    quantized = [key for key in _QUANTIZED if section.get(key) in (True, "true")]
    size = section.get("zero_hpz_partition_size", 1)
    if int(section.get("stage", 0)) != 3:
        return  # the keys have no effect there, as the notes on the JSON say
    problems = []
    if quantized and device == "cpu":
        problems.append(f"{', '.join(quantized)}: DeepSpeed quantizes only on a GPU; remove them to train on a CPU")
    if size != "auto" and (isinstance(size, bool) or not str(size).isdecimal() or int(size) < 1 or world % int(size)):
        fitting = " or ".join(str(part) for part in range(1, world + 1) if world % part == 0)
        problems.append(
            f"zero_hpz_partition_size is {size}, which does not divide the {plural(world, 'rank')}: set {fitting}"
        )
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
