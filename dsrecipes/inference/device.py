"""On which device is a finished run's model loaded (--device), and what helps when memory runs out?"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsrecipes.errors import UserError

if TYPE_CHECKING:
    import torch

_FORM = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def find_device(name: str = "auto", use_cpu: bool = False) -> torch.device:
    """The device to load a model on.

    Args:
        name: cpu, cuda, cuda:N, or auto: the first GPU that torch can use, else the CPU.
        use_cpu: what the run was trained with; auto follows it, an explicit device does not.

    Raises:
        UserError: no such device, or not the name of a device.
    """
    if not _FORM.fullmatch(name):
        raise UserError("DSR456", f"--device {name}: choose auto, cpu, cuda, or cuda:N for GPU number N")
    import torch

    # --device cpu must not initialize CUDA, which takes seconds and memory of the GPU.
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count and not use_cpu else "cpu"
    if name != "cpu" and int(name.partition(":")[2] or 0) >= count:
        known = "cpu" + "".join(f", cuda:{index}" for index in range(count))
        raise UserError("DSR456", f"--device {name}: torch finds no such GPU on this machine; the devices are {known}")
    return torch.device(name)


def add_device(parser: argparse.ArgumentParser, default: str = "auto", why: str = "a GPU if there is one") -> None:
    """Add --device to a command that loads the model of a finished run."""
    parser.add_argument(
        "--device", default=default, metavar="auto|cpu|cuda|cuda:N", help=f"where to compute (default: {default}, {why})"
    )


class OutOfMemoryError(UserError):
    """Memory ran out in a command on a finished run; a class of its own, so that an outer handler leaves it as it is."""

    def __init__(self, message: str) -> None:
        super().__init__("DSR457", message)


@contextlib.contextmanager
def memory_errors(*remedies: str) -> Iterator[None]:
    """Turn running out of memory into a UserError; a context manager and a decorator.

    Args:
        remedies: what lowers the need on any device, such as "a smaller --batch_size"; --device cpu is added where a
            GPU's memory ran out.
    """
    try:
        yield
    except OutOfMemoryError:
        # The innermost handler knows the remedies best.
        raise
    except (MemoryError, RuntimeError, OSError, UserError) as error:
        # The exception may hide its cause, such as "cannot be loaded" for a file that could not be mapped.
        cause = next((link for link in _chain(error) if _is_out_of_memory(link)), None)
        if cause is None:
            raise
        raise OutOfMemoryError(_message(cause, remedies)) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as model.memory decides it. That imports torch, without which only Python itself can run out."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from dsrecipes.model.memory import is_out_of_memory

    return is_out_of_memory(error)


def _message(error: BaseException, remedies: tuple[str, ...]) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    on_gpu = type(error).__name__ == "OutOfMemoryError" or "cuda" in reason.lower()
    memory, choices = "host", [*remedies, "a machine with more memory"]
    if on_gpu:
        memory, choices = "GPU", ["--device cpu", *remedies]
    return f"ran out of {memory} memory: {reason.rstrip('.')}. Try {', or '.join(choices)}"
