"""Which safetensors files a saved model has, what tensors they hold, and the fingerprint of each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsrecipes.errors import UserError, plural
from dsrecipes.io.disk import checksum

GATHER_HINT = "ZeRO-3 writes none unless stage3_gather_16bit_weights_on_model_save is true"
"""Why weights may be missing."""
_LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights of a saved model, or of its adapter.

    Raises:
        UserError: there is none, or one that the index names is missing.
    """
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError("DSR330", f"{folder} holds no weights (no .safetensors file); {GATHER_HINT}")
        return files
    return indexed_files(index)


def indexed_files(index: Path) -> list[Path]:
    """Weights files that an index names, in the folder of the index.

    Raises:
        UserError: the index is damaged, names a file elsewhere, or one that is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # An index is a file of the model's author: it must not make us read other folders.
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError("DSR331", f"{index} is damaged: it does not say which tensor is in which file") from error
    if outside or not names:
        problem = f"{outside[0]!r} is not a file of this folder" if outside else "it names no file"
        raise UserError("DSR331", f"{index} is damaged: {problem}")
    files = [index.with_name(name) for name in names]
    for path in files:
        if not path.is_file():
            raise UserError("DSR330", f"{path} is missing: {index.name} names {plural(len(files), 'file')}")
    return files


def loaded_files(folder: Path) -> list[Path]:
    """Files from which transformers, or peft for an adapter folder, loads the weights; none where they are pickles.

    Raises:
        UserError: the index is damaged, or a file that it names is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    # without config.json, it is an adapter's folder
    if not (folder / "config.json").is_file():
        single = folder / "adapter_model.safetensors"
    if single.is_file():
        return [single]
    return indexed_files(index) if index.is_file() else sorted(folder.glob("model*.safetensors"))


def check_readable(files: list[Path]) -> None:
    """Read the headers of weights files (UserError: one is damaged, truncated, or a pointer of Git LFS)."""
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return UserError("DSR332", f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    return UserError("DSR332", f"{path} is truncated or damaged: {str(error).splitlines()[0]}")


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors of a file, one tensor in memory at a time.

    Raises:
        UserError: the file is truncated or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def fingerprint(tensor: torch.Tensor) -> str:
    """Dtype, shape and CRC-32 of a tensor's bytes, as text."""
    # as bytes, because numpy has no bf16
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} {zlib.crc32(data):08x}"


def folder_checksum(folder: Path) -> str:
    """A sha256 over the names and contents of the files directly in a folder."""
    # sorted: the order of a directory differs between file systems
    lines = [f"{path.name} {checksum(path)}\n" for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
