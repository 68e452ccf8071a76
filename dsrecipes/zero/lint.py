"""Which keys of a ZeRO JSON DeepSpeed reads: known, renamed, removed, or without effect here.

DeepSpeed ignores unknown keys in most blocks, so that a misspelled one trains something else without an error.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version

from dsrecipes.config.flags import is_true
from dsrecipes.errors import UserError, coded, nearest

Json = dict[str, Any]

_PACKAGES = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}
"""Monitor of DeepSpeed -> the package that it needs."""
_STAGE_3 = ("stage3_", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients", "sub_group_size")
"""Prefixes of keys that DeepSpeed reads only at stage 3."""


@functools.cache
def key_table(version: str | None) -> Json:
    """Load the table of keys for a version of DeepSpeed.

    keys/VERSION.json holds `sections` (path of a block -> its keys), `strict` (blocks whose unknown keys DeepSpeed refuses;
    it ignores those of all others), `removed` (key -> what to do), `renamed` (old key -> new key), `elsewhere` (a key that
    nothing reads -> the one that is meant) and `unused` (key -> why it has no effect under Trainer).

    Args:
        version: the newest table that is not newer is taken, otherwise the oldest; None: the newest of all.
    """
    tables = sorted(Path(__file__).with_name("keys").glob("*.json"), key=lambda path: Version(path.stem))
    fitting = [path for path in tables if version is None or Version(path.stem) <= Version(version)]
    return json.loads((fitting[-1] if fitting else tables[0]).read_text(encoding="utf-8"))


def _installed() -> str | None:
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None


def lint(config: Json, path: Path) -> list[str]:
    """Rename old keys in place, and report keys without effect.

    Returns:
        A note for each renamed key and each key without effect.

    Raises:
        UserError: a key that no block has, that DeepSpeed has removed, or that the recipes do not support.
    """
    table = key_table(_installed())
    for part in ("offload_optimizer", "offload_param"):
        block, name = _block(config, f"zero_optimization.{part}")
        # DeepSpeed reads null as a missing block; an old name may set it instead.
        if block.get(name, ()) is None:
            del block[name]
    renamings = [_rename(config, old, new, table, path) for old, new in table["renamed"].items() if _has(config, old)]
    notes = [note for note in renamings if note]
    _refuse_unknown(config, "", table, path)
    _refuse_unsupported(config, path)
    for key, reason in table["unused"].items():
        if _has(config, key):
            notes.append(coded("DSR280", f"{path}: {key} has no effect: {reason}"))
    return notes + _unused_at_stage(config, path) + _written_elsewhere(config, path)


def _block(config: Json, key: str) -> tuple[Json, str]:
    """The block that holds a dotted key (empty where it is not there), and the key's last name."""
    *parents, name = key.split(".")
    block: Any = config
    for parent in parents:
        block = block.get(parent) if isinstance(block, dict) else None
    return (block if isinstance(block, dict) else {}), name


def _has(config: Json, key: str) -> bool:
    block, name = _block(config, key)
    return name in block


def _rename(config: Json, old: str, new: str, table: Json, path: Path) -> str | None:
    block, name = _block(config, old)
    value, target = block.pop(name), new.rpartition(".")[2]
    # An old switch that is off, such as cpu_offload false, turns off what is off by default.
    if value is False:
        return None
    if target in block:
        raise UserError("DSR255", f"{path}: {old} and {new} are both given; keep {new}")
    # cpu_offload: true names no device, which was always the CPU.
    if new in table["sections"] and isinstance(value, bool):
        value = {"device": "cpu"}
    block[target] = value
    shown = f" {json.dumps(value)}" if isinstance(value, dict) else ""
    return coded("DSR281", f"{path}: {old} is an old name, read as {new}{shown}")


def _refuse_unknown(config: Json, section: str, table: Json, path: Path) -> None:
    """Refuse keys that the table does not have, and blocks that are not objects (UserError)."""
    sections = table["sections"]
    for key, value in config.items():
        name = f"{section}.{key}" if section else key
        if section in sections and key not in sections[section]:
            raise _unknown(name, table, path)
        if name in sections and not isinstance(value, dict):
            raise UserError("DSR256", f"{path}: {name} must be an object")
        if isinstance(value, dict):
            _refuse_unknown(value, name, table, path)
    max_norm = "optimizer.params.max_grad_norm"
    if not section and _has(config, max_norm):
        raise _unknown(max_norm, table, path)


def _unknown(name: str, table: Json, path: Path) -> UserError:
    """Describe a key that its block does not have."""
    if name in table["removed"]:
        return UserError("DSR254", f"{path}: DeepSpeed has removed {name} ({table['removed'][name]})")
    section, _, key = name.rpartition(".")
    known = {known_key.lower(): known_key for known_key in table["sections"].get(section, ())}
    # A key in the wrong block is a common mistake, so the message names the right one.
    owners = [f"{block}.{key}" if block else key for block, keys in table["sections"].items() if key in keys]
    if name in table["elsewhere"]:
        suggestion = f": use {table['elsewhere'][name]}"
    elif len(owners) == 1:
        suggestion = f": it belongs to {owners[0]}"
    elif key.lower() in known:
        suggestion = f" (did you mean {known[key.lower()]}?)"
    else:
        suggestion = nearest(key, known.values())
    return UserError("DSR253", f"{path}: {section or 'DeepSpeed'} has no key {key!r}{suggestion}")


def _is_on(config: Json, key: str) -> bool:
    block, name = _block(config, key)
    return is_true(block.get(name))


def _refuse_unsupported(config: Json, path: Path) -> None:
    """Refuse what needs a package that is missing, or a mode of the engine that the recipes do not support (UserError)."""
    for key, package in _PACKAGES.items():
        if _is_on(config, f"{key}.enabled") and find_spec(package) is None:
            raise UserError(
                "DSR257", f"{path}: {key}.enabled needs the package {package}: pip install {package}, or set it to false"
            )
    for key in ("expert_parallel", "hybrid_engine"):
        if _is_on(config, f"{key}.enabled"):
            raise UserError("DSR258", f"{path}: {key} is not supported by the recipes; remove the block")
    if _is_on(config, "torch_autocast.enabled"):
        raise UserError("DSR258", f"{path}: torch_autocast is not supported by the recipes; turn bf16 or fp16 on instead")
    if str(config.get("gradient_allreduce_op", "mean")).lower() != "mean":
        raise UserError(
            "DSR258", f"{path}: gradient_allreduce_op sum would multiply the gradients by the number of ranks; remove it"
        )
    for key in ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size", "sequence_parallel_size"):
        block, name = _block(config, key)
        if block.get(name) not in (None, 0, 1):
            raise UserError(
                "DSR258",
                f"{path}: {key} {block[name]} is not supported by the recipes, whose ranks each take different rows; "
                "remove it. ZeRO-3 shards the model over the ranks too",
            )


def _written_elsewhere(config: Json, path: Path) -> list[str]:
    """Notes on DeepSpeed's monitors, which write files outside the run folder."""
    notes = []
    for key in ("tensorboard", "csv_monitor"):
        if _is_on(config, f"{key}.enabled"):
            folder = config[key].get("output_path") or "a folder of its own"
            notes.append(coded("DSR282", f"{path}: {key} writes into {folder}, outside the run folder"))
    return notes


def _unused_at_stage(config: Json, path: Path) -> list[str]:
    """A note on keys that DeepSpeed reads only at stage 3, where the stage is another one."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    # A key that is off changes nothing at any stage.
    unused = [key for key in zero if key.startswith(_STAGE_3) and zero[key] not in (None, False, "auto")]
    if str(stage) == "3" or not unused:
        return []
    verb = "has" if len(unused) == 1 else "have"
    return [coded("DSR280", f"{path}: {', '.join(unused)} {verb} no effect at stage {stage}")]
