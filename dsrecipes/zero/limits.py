"""Which ZeRO settings this machine, or this number of ranks, cannot run: refused before anything starts."""

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
"""Keys of ZeRO++ (arXiv:2306.10209) that need DeepSpeed's CUDA kernels."""


def check_accelerators() -> None:
    """Refuse to fall back to the CPU where the driver lists a GPU that torch cannot use.

    Raises:
        UserError: names driver, torch's build and torch's own reason.
    """
    # Without this check a run on a cluster would train on the CPU for hours before anybody notices.
    count = listed_accelerators()
    if not count:
        return
    raise UserError(
        "DSR250",
        f"the driver ({_driver()}) lists {plural(count, 'GPU')}, but torch {torch.__version__} ({_build()}) cannot use "
        f"{'them' if count > 1 else 'it'}: {_why_unusable()}. Install a torch built for this driver "
        "(https://pytorch.org/get-started/locally) or a newer driver; --use_cpu true trains on the CPU",
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
        # nvidia-smi can hang on a broken driver.
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "version unknown"
    version = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", output)
    return f"NVIDIA {version[0]}" if version else "version unknown"


def _why_unusable() -> str:
    """torch's own reason, and the value of CUDA_VISIBLE_DEVICES, which may hide all GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    prefix = ""
    if visible:
        prefix = f"CUDA_VISIBLE_DEVICES is {visible!r}, which may name no GPU of this machine (`nvidia-smi -L`); "
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f"{prefix}{str(error).strip().splitlines()[0].rstrip('.')}"
    return f"{prefix}torch.cuda.is_available() is False"


def check_precision(stage: int, precision: str, chosen: bool) -> None:
    """Refuse fp16 at stage 0: DeepSpeed divides its gradients by a loss scale that it never applied.

    Only ZeRO's own optimizers scale the loss (DeepSpeed 0.19.8, runtime/engine.py, scale_if_loss), and stage 0 has another
    one.

    Args:
        stage: of ZeRO.
        precision: of the run: fp32, bf16 or fp16.
        chosen: whether the user requested fp16; otherwise it is the default on this GPU.

    Raises:
        UserError: says what to use instead.
    """
    if stage != 0 or precision != "fp16":
        return
    reason = "" if chosen else ", which is the default on this GPU, as it has no bf16"
    raise UserError(
        "DSR251",
        f"stage 0 of DeepSpeed in fp16{reason}: it divides the gradients by a loss scale that was never applied, so nothing "
        "is learned. Give --deepspeed zero1 (or none), or --fp16 false for fp32",
    )


def check_zeropp(path: Path, section: dict[str, Any], world: int, device: str) -> None:
    """Refuse settings of ZeRO++ that this device or this number of ranks cannot run.

    Args:
        path: of the ZeRO JSON, for the message.
        section: its zero_optimization.
        world: number of ranks.
        device: cpu, cuda, ...

    Raises:
        UserError: names each key and what to do.
    """
    if int(section.get("stage", 0)) != 3:
        # The keys have no effect there, which lint has noted.
        return
    quantized = [key for key in _QUANTIZED if section.get(key) in (True, "true")]
    problems = []
    if quantized and device == "cpu":
        problems.append(f"{', '.join(quantized)}: DeepSpeed quantizes only on a GPU; remove them to train on a CPU")
    size = section.get("zero_hpz_partition_size", 1)
    if size != "auto" and not _divides(size, world):
        divisors = " or ".join(str(number) for number in range(1, world + 1) if world % number == 0)
        problems.append(
            f"zero_hpz_partition_size is {size}, which does not divide the {plural(world, 'rank')}: set {divisors}"
        )
    if problems:
        raise UserError("DSR252", f"{path}: {'; '.join(problems)}")


def _divides(size: Any, world: int) -> bool:
    """Whether a value of the JSON is a whole number, possibly written as text, that divides the number of ranks."""
    # bool is a subclass of int.
    if isinstance(size, bool) or not str(size).isdecimal():
        return False
    return int(size) >= 1 and world % int(size) == 0
