"""Whether a checkpoint's files are byte for byte what was saved, and safe to load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dsrecipes.errors import UserError, coded
from dsrecipes.io.disk import checksum
from dsrecipes.runs.checkpoint_manifest import read_manifest

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")
_KNOWN_GLOBALS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.dtypes.UInt32DType",
        "numpy.ndarray",
    }
)
"""Names in files of DeepSpeed 0.19 and Trainer that torch.load(weights_only=True) would refuse: data, no code."""


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first file that differs from what was saved, or that nobody should load; None where all are good.

    A pickle is scanned for the names in it, never executed: loading one calls what it names, whatever the manifest says,
    so that a name outside the files of Trainer and DeepSpeed is refused.

    Args:
        part: which of the files to look at, so that ranks share the work: every `parts`-th from `part` on.
    """
    files = read_manifest(checkpoint)["files"]
    # sorted, so that all ranks divide the same list
    for name in sorted(files)[part::parts]:
        path = checkpoint / name
        try:
            if checksum(path) != files[name][1]:
                return f"{name} is damaged: its sha256 differs from the manifest's"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        # also where the hash is right: a manifest proves only that nothing changed since whoever wrote it
        problem = _pickle_problem(path, name) if path.suffix in _PICKLES else None
        if problem:
            return problem
    return None


def _pickle_problem(path: Path, name: str) -> str | None:
    import torch  # here, since those who only look for checkpoints need no torch

    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _KNOWN_GLOBALS
    except Exception as error:  # whatever a damaged or hostile pickle makes the reader raise
        return f"{name} is not a file of torch.save ({type(error).__name__})"
    return f"{name} would run {sorted(names)[0]} when it is loaded" if names else None


def first_intact(candidates: list[Path], check: Callable[[Path], str | None], say: Callable[[str], None]) -> Path:
    """The first candidate that `check` finds nothing wrong with; the others are reported and left in place.

    Raises:
        UserError: none is intact.
    """
    reason = ""
    for path in candidates:
        problem = check(path)
        if problem is None:
            return path
        reason = f"{path}: {problem}"
        say(coded("DSR343", f"{'damaged':<10}{reason}; ignored"))
    raise UserError(
        "DSR340",
        f"--resume_from_checkpoint: {reason}. No other checkpoint was requested or is intact; "
        "give another one, or start a new run in another --output_dir",
    )
