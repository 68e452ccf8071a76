"""How is a checkpoint stored for any number of ranks and any ZeRO stage? dsrecipes reshape RUN

A run resumes from any checkpoint without it. The folder is for other machines and tools: one copy of everything, no pickle
of DeepSpeed's, and no shard that only its own rank reads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.io.arguments import CommandParser
from dsrecipes.io.disk import checksum, is_disk_full, put_in_place
from dsrecipes.runs.checkpoint_integrity import find_damage, first_intact
from dsrecipes.runs.checkpoint_manifest import MANIFEST, hash_files, is_complete, list_files, read_manifest, write_manifest
from dsrecipes.runs.folder import find_checkpoints, find_run

if TYPE_CHECKING:
    from dsrecipes.zero.checkpoint_states import CheckpointStates

_SHARD = 2 << 30
"""Approximate bytes of a file, which are all in memory at once."""


def reshape(run: str, *, checkpoint: str | None = None) -> dict[str, Any]:
    """Write checkpoints/universal-N next to checkpoint-N, unless it exists.

    Args:
        run: a run folder, or `last`.
        checkpoint: `step100` or a path; default: the newest intact one.

    Returns:
        path, step, and bytes written: 0 where what is there fits anywhere as it is.

    Raises:
        UserError: no such checkpoint, or too little space.
    """
    from dsrecipes.zero.checkpoint_states import UNIVERSAL, read_states, read_writer

    folder = find_run(run, ended=False)
    candidates = find_checkpoints(checkpoint or "auto", folder, print)
    if not candidates:
        raise UserError("DSR555", f"{folder.path} has no checkpoint")
    source = first_intact(candidates, find_damage, print)
    writer = read_writer(source)
    step = int(source.name.rsplit("-", 1)[-1])
    # Plain PyTorch and ZeRO-0 do not shard, so their checkpoints fit any number of ranks.
    if (source / UNIVERSAL).is_file() or writer.get("zero") in (None, 0):
        return {"path": str(source), "step": step, "bytes": 0}
    target = source.with_name(f"universal-{step}")
    origin = checksum(source / MANIFEST)
    if is_complete(target) and read_writer(target).get("from") == origin:
        return {"path": str(target), "step": step, "bytes": 0}
    size = _write_atomically(read_states(source, []), source, target, origin, writer.get("sequences"))
    return {"path": str(target), "step": step, "bytes": size}


def _write_atomically(saved: CheckpointStates, source: Path, target: Path, origin: str, sequences: int | None) -> int:
    """Write the checkpoint under another name, and rename it when it is complete; return its bytes.

    Args:
        saved: the states of `source`.
        source: a sharded checkpoint.
        target: where the unsharded one goes.
        origin: checksum of the manifest of `source`, by which a copy that exists is recognized.
        sequences: of the data, as the manifest of `source` has it.

    Raises:
        UserError: too little space.
    """
    # States are written in fp32: 4 bytes per element.
    needed = sum(saved.numel(name) * 4 * len(saved.keys(name)) for name in saved.fragments)
    free = shutil.disk_usage(source).free
    if needed > free:
        raise UserError(
            "DSR556",
            f"{target} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free: make room, or resume as it is",
        )
    staging = target.with_name(f".{target.name}.partial")
    # A killed command may have left one.
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        _write(saved, source, staging)
        origins = {"ranks": None, "sequences": sequences, "from": origin}
        write_manifest(staging, hash_files(staging, list_files(staging)), origins, read_manifest(source)["contract"])
        put_in_place(staging, target)
    except (OSError, RuntimeError) as error:
        if is_disk_full(error, staging):
            raise UserError("DSR532", f"{target}: no space left on the disk") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return needed


def _write(saved: CheckpointStates, source: Path, folder: Path) -> None:
    """Write a safetensors file for each 2 GB of each key, and JSON for what is no tensor."""
    from safetensors.torch import save_file

    from dsrecipes.zero.checkpoint_states import UNIVERSAL, layout_independent_files

    keys = sorted({key for name in saved.fragments for key in saved.keys(name)})
    for key in keys:
        for number, names in enumerate(_parts(saved, key)):
            whole = {name: saved.piece(name, key, 0, saved.numel(name)) for name in names}
            save_file(whole, folder / f"{key}-{number:05}.safetensors")
    if saved.buffers:
        save_file({name: tensor.contiguous() for name, tensor in saved.buffers.items()}, folder / "buffers.safetensors")
    for path in layout_independent_files(source):
        shutil.copy(path, folder)
    engine = saved.engine
    if (source / "scheduler.pt").is_file():
        # scheduler.pt, copied above, already holds the schedule.
        engine = {key: value for key, value in engine.items() if key != "lr_scheduler"}
    facts = {"keys": keys, "steps": saved.steps, "groups": saved.groups, "rates": saved.rates, "engine": engine}
    (folder / UNIVERSAL).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _parts(saved: CheckpointStates, key: str) -> Iterator[list[str]]:
    """Yield the names of the parameters of each file."""
    names: list[str] = []
    size = 0
    for name in saved.fragments:
        if key in saved.keys(name):
            names.append(name)
            size += 4 * saved.numel(name)
        if size >= _SHARD:
            yield names
            names, size = [], 0
    if names:
        yield names


def main(argv: list[str]) -> int:
    """`dsrecipes reshape RUN`."""
    parser = CommandParser("reshape", "Write a checkpoint as one folder for any number of ranks and any ZeRO stage.")
    parser.add_argument("run", metavar="RUN", help="run folder, or `last`")
    parser.add_argument("--checkpoint", metavar="stepN|PATH", help="default: the newest intact one")
    flags = parser.parse_args(argv)
    # Reading DeepSpeed's objects imports DeepSpeed, which would report that it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    result = reshape(flags.run, checkpoint=flags.checkpoint)
    written = f"{result['bytes'] / 1e6:,.1f} MB written" if result["bytes"] else "nothing to write: it exists"
    print(f"step {result['step']:<5}{result['path']} · {written}")
    print(
        f"resume    dsrecipes train --config {find_run(flags.run, ended=False).config} --resume_from_checkpoint {result['path']} "
        "[--procs N] [--deepspeed zeroN]"
    )
    return 0
