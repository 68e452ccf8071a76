"""What a checkpoint holds, parameter by parameter, whichever ranks, ZeRO stage or plain PyTorch wrote it.

DeepSpeed's own way is ds_to_universal and `load_universal`. As of 0.19.8 that loses the steps between ZeRO-3 and the
others, gives every group of ZeRO-3 the weight decay of the first, knows no ZeRO-0, and writes everything twice. Here
nothing is converted: the files are mapped into memory, and each rank copies the pieces that are its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dsrecipes.errors import UserError
from dsrecipes.runs.checkpoint_manifest import is_complete, read_manifest

WEIGHT = "weight"
"""The key of a parameter's value in full precision, beside the optimizer's own: exp_avg, exp_avg_sq, ..."""
UNIVERSAL = "parameters.json"
"""The file that makes a folder one of `dsrecipes reshape`, which fits any number of ranks and any stage."""
ROUND_ROBIN = (
    "with round_robin_gradients DeepSpeed does not record where each parameter's state lies, so it cannot be divided anew. "
    "Go on under the ZeRO JSON and on as many ranks as the checkpoint was written with"
)
WRAPPED = (
    "ZeRO-0 in 16 bits keeps its state in a form of its own, which cannot be divided anew: the checkpoints of ZeRO-1, 2 and "
    "3 and of plain PyTorch go on on any number of ranks and under each other"
)
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass
class CheckpointStates:
    """Weights and optimizer state by parameter."""

    fragments: dict[str, list[tuple[dict[str, Any], int, int]]] = field(default_factory=dict)
    """Name -> its pieces in order: (flat tensors by key, where it begins in them, number of elements)."""
    steps: dict[str, float] = field(default_factory=dict)
    """Name -> steps that its optimizer state has seen."""
    groups: dict[str, int] = field(default_factory=dict)
    """Name -> number of its group; plain PyTorch keeps a group that has no parameters, and DeepSpeed does not."""
    rates: list[float] = field(default_factory=list)
    """Learning rate of each group."""
    engine: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's counters, loss scaler and scheduler; empty for plain PyTorch."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def numel(self, name: str) -> int:
        """Elements of a parameter; 0 where the checkpoint lacks it."""
        return sum(numel for _, _, numel in self.fragments.get(name, []))

    def keys(self, name: str) -> list[str]:
        """What is saved of a parameter."""
        return list(next(iter(self.fragments[name]))[0])

    def piece(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements start to stop of one parameter, flat."""
        parts, at = [], 0
        for tensors, offset, numel in self.fragments[name]:
            low, high = max(start - at, 0), min(stop - at, numel)
            if low < high:
                parts.append(tensors[key][offset + low : offset + high])
            at += numel
        return torch.cat(parts) if parts else torch.empty(0)


def read_writer(checkpoint: Path) -> dict[str, Any]:
    """Ranks, stage and sequences a step of what wrote a checkpoint (ValueError: its manifest is damaged)."""
    return read_manifest(checkpoint)["made_by"]


def loads_directly(made: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether DeepSpeed or Trainer loads the checkpoint as it is: the same place, or states that were never divided."""
    divided = made.get("ranks") == here["ranks"] and made.get("layout", here["layout"]) == here["layout"]
    whole = made.get("zero") in (None, 0) or divided
    return not made or ("zero" in made and made["zero"] == here["zero"] and whole)


def read_states(checkpoint: Path, names: list[str]) -> CheckpointStates:
    """Open a checkpoint whose manifest has been verified; nothing is read yet but what says where things lie.

    Args:
        names: the trained parameters in the optimizer's order, by which undivided states are numbered.

    Raises:
        UserError: it is not whole, or its states cannot be divided anew.
    """
    if not is_complete(
        checkpoint
    ):  # below, pickles are opened; who calls has looked into them (checkpoint_integrity.find_damage)
        raise UserError(f"{checkpoint} is not whole (a save was cut off)")
    if (checkpoint / UNIVERSAL).is_file():
        return _read_neutral(checkpoint)
    stage = read_writer(checkpoint).get("zero")
    if stage is None:
        return _read_plain(checkpoint, names)
    folder = _engine_folder(checkpoint)
    model = _load(_files(folder, "*model_states.pt")[0])
    if model.get("ds_config", {}).get("zero_optimization", {}).get("round_robin_gradients"):
        raise UserError(f"{checkpoint}: {ROUND_ROBIN}")
    if stage == 0:
        if "param_groups" not in model["optimizer"]:
            raise UserError(f"{checkpoint}: {WRAPPED}")
        saved = _number(names, model["optimizer"], model["module"].__getitem__)
    else:
        shards = [_load(path)["optimizer_state_dict"] for path in _files(folder, "*zero_pp_rank_*optim_states.pt")]
        saved = (_read_zero3 if stage == 3 else _read_zero12)(shards, model["param_shapes"])
        scaler = shards[0].get("loss_scaler")
        saved.engine["loss_scaler"] = (
            {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))} if scaler else {}
        )
    saved.engine |= {key: model[key] for key in COUNTERS} | {"lr_scheduler": model.get("lr_scheduler")}
    buffers = set(model.get("buffer_names") or ())
    saved.buffers = {name: tensor for name, tensor in model["module"].items() if name in buffers}
    return saved


def _engine_folder(checkpoint: Path) -> Path:
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    if (folder / "offloaded_tensors").is_dir():
        raise UserError(
            f"{checkpoint}: NVMe offload saves its swap files as they are, and they cannot be divided anew. Resume it on as "
            "many ranks as wrote it, under the same ZeRO JSON"
        )
    return folder


def _files(folder: Path, pattern: str) -> list[Path]:
    """Files by rank, rank 0 first."""
    return sorted(folder.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _load(path: Path) -> dict[str, Any]:
    """DeepSpeed's pickles hold objects of its own, so weights_only would refuse them."""
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _flat(path: str, state: dict[str, Any], weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """The flat tensors of one piece of optimizer state, and its step."""
    tensors, step = {WEIGHT: weight.flatten()}, 0.0
    for key, value in state.items():
        if key == "step":
            step = float(value)
        elif torch.is_tensor(value) and value.numel() >= weight.numel():
            tensors[key] = value.flatten()
        else:
            raise UserError(
                f"the optimizer keeps {key} of {path} not element by element, so its state cannot be divided anew: "
                "resume with as many ranks and the ZeRO stage that wrote it"
            )
    return tensors, step


def _read_zero12(shards: list[dict], shapes: list[dict]) -> CheckpointStates:
    saved = CheckpointStates(rates=[group["lr"] for group in shards[0]["base_optimizer_state"]["param_groups"]])
    for shard in shards:
        for group, mapping in enumerate(shard["param_slice_mappings"]):
            state = shard["base_optimizer_state"]["state"].get(group, {})
            tensors, step = _flat(f"group {group}", state, shard["single_partition_of_fp32_groups"][group])
            for name, address in mapping.items():
                saved.fragments.setdefault(name, []).append((tensors, address.start, address.numel))
                saved.steps[name], saved.groups[name] = step, group
    return saved


def _read_zero3(shards: list[dict], shapes: list[dict]) -> CheckpointStates:
    groups = shards[0]["optimizer_state_dict"]["param_groups"]
    saved = CheckpointStates(rates=[group["lr"] for group in groups])
    group_of = {number: group for group, options in enumerate(groups) for number in options["params"]}
    for rank, shard in enumerate(shards):
        for part, names in enumerate(shapes):
            state = shard["optimizer_state_dict"]["state"].get(part, {})
            tensors, step = _flat(f"group {part}", state, shard["fp32_flat_groups"][part])
            offset = 0
            for name, shape in names.items():
                share = math.ceil(shape.numel() / len(shards))
                numel = max(0, min(share, shape.numel() - rank * share))
                saved.fragments.setdefault(name, []).append((tensors, offset, numel))
                saved.steps[name], saved.groups[name] = step, group_of[part]
                offset += share
    return saved


def _read_plain(checkpoint: Path, names: list[str]) -> CheckpointStates:
    optimizer = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    files = [safe_open(path, "pt") for path in sorted(checkpoint.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def weight(name: str) -> torch.Tensor:
        known = name if name in where else name.replace(".default.", ".")  # as peft saves an adapter
        if known not in where:
            raise UserError(f"{checkpoint} has no weights of {name}: it was written by another model")
        return where[known].get_tensor(known)

    return _number(names, optimizer, weight)


def _number(names: list[str], optimizer: dict[str, Any], weight: Any) -> CheckpointStates:
    """Undivided states, which an optimizer numbers in the order of its groups."""
    saved = CheckpointStates(rates=[group["lr"] for group in optimizer["param_groups"]])
    numbers = {number: index for index, group in enumerate(optimizer["param_groups"]) for number in group["params"]}
    if len(numbers) != len(names):
        raise UserError(f"the checkpoint's optimizer has {len(numbers)} parameters, and this run's {len(names)}")
    for name, (number, group) in zip(names, numbers.items(), strict=True):
        saved.groups[name] = group
        tensors, saved.steps[name] = _flat(name, optimizer["state"].get(number, {}), weight(name))
        saved.fragments[name] = [(tensors, 0, tensors[WEIGHT].numel())]
    return saved


class _Lazy:
    """A tensor of a safetensors file that is read piece by piece."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, piece: slice) -> torch.Tensor:
        return self.file.get_slice(self.name)[piece]


def _read_neutral(folder: Path) -> CheckpointStates:
    told = json.loads((folder / UNIVERSAL).read_text(encoding="utf-8"))
    saved = CheckpointStates(steps=told["steps"], groups=told["groups"], rates=told["rates"], engine=told["engine"])
    for key in told["keys"]:
        for path in sorted(folder.glob(f"{key}-*.safetensors")):
            file = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                numel = math.prod(file.get_slice(name).get_shape())
                saved.fragments.setdefault(name, [({}, 0, numel)])[0][0][key] = _Lazy(file, name)
    for path in folder.glob("buffers.safetensors"):
        with safe_open(path, "pt") as file:
            saved.buffers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return saved


def layout_independent_files(checkpoint: Path) -> Iterable[Path]:
    """The files of a checkpoint beside weights and optimizer state, which fit anywhere: schedule, state, random numbers."""
    patterns = ("trainer_state.json", "progress.json", "scheduler.pt", "rng_state*.pth", "scaler.pt")
    return (path for pattern in patterns for path in sorted(checkpoint.glob(pattern)))
