"""The safetensors files of a saved model: which there are, their tensors, and a fingerprint of each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dsrecipes.errors import UserError, plural
from dsrecipes.io.disk import checksum

GATHER_HINT = "ZeRO-3 leaves none unless stage3_gather_16bit_weights_on_model_save is true"
"""Why there may be nothing."""
_LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a saved model's weights, or its adapter's.

    Raises:
        UserError: there is none, or one that the index names is missing.
    """
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no weights (no .safetensors file); {GATHER_HINT}")
        return files
    return indexed_files(index)


def indexed_files(index: Path) -> list[Path]:
    """The weights files that an index names; they lie beside it (UserError: one does not, or it is damaged)."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: it does not say which tensor lies in which file") from error
    if outside or not names:
        told = f"{outside[0]!r} is no file of this folder" if outside else "it names no file"
        raise UserError(f"{index} is damaged: {told}")
    for name in names:
        if not index.with_name(name).is_file():
            raise UserError(f"{index.with_name(name)} is missing: {index.name} names {plural(len(names), 'file')}")
    return [index.with_name(name) for name in names]


def loaded_files(folder: Path) -> list[Path]:
    """The files from which transformers, or peft for an adapter folder, loads the weights; none where they are pickles.

    Raises:
        UserError: the index is damaged, or a file that it names is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        single = folder / "adapter_model.safetensors"
    if single.is_file():
        return [single]
    return indexed_files(index) if index.is_file() else sorted(folder.glob("model*.safetensors"))


def check_readable(files: list[Path]) -> None:
    """Read the headers of weights files (UserError: one is damaged, cut off, or a pointer of Git LFS)."""
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    return UserError(f"{path} is cut off or damaged: {str(error).splitlines()[0]}")


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a file, one in memory at a time.

    Raises:
        UserError: the file is cut off or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def fingerprint(tensor: torch.Tensor) -> str:
    """Dtype, shape and checksum of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {zlib.crc32(data.numpy()):08x}"


def folder_checksum(folder: Path) -> str:
    """A sha256 over the names and bytes of the files directly in a folder."""
    lines = [f"{path.name} {checksum(path)}\n" for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
