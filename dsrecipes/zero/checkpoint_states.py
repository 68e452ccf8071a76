"""What a checkpoint holds of each parameter: fp32 weights and optimizer states, whichever layout they were written in.

DeepSpeed's own conversion (ds_to_universal of 0.19) leaves the moments of ZeRO-3 in bf16 on paths of its own, gives
every group of ZeRO-3 the weight decay of the first, does not support ZeRO-0, and writes everything twice. Here
nothing is converted: the files are mapped into memory, and each rank copies the pieces that are its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dsrecipes.errors import UserError
from dsrecipes.runs.checkpoint_manifest import is_complete, read_manifest

WEIGHT = "weight"
"""The key of a parameter's value in full precision; the optimizer has its own: exp_avg, exp_avg_sq, ..."""
UNIVERSAL = "parameters.json"
"""The file that marks a folder written by `dsrecipes reshape`, which any number of ranks and any stage can load."""
ROUND_ROBIN = (
    "with round_robin_gradients DeepSpeed does not record where each parameter's state is, so it cannot be resharded. "
    "Resume under the ZeRO JSON and on as many ranks as the checkpoint was written with"
)
WRAPPED = (
    "ZeRO-0 in 16 bits keeps its state in a form of its own, which cannot be resharded: checkpoints of ZeRO-1, 2 and 3 and "
    "of plain PyTorch can be resumed on any number of ranks and under each other"
)
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class _FileTensor:
    """A tensor of a safetensors file, of which slices are read on demand."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, piece: slice) -> torch.Tensor:
        return self.file.get_slice(self.name)[piece]


Tensors = dict[str, "torch.Tensor | _FileTensor"]
"""Key of a state -> its flat tensor."""


@dataclass
class CheckpointStates:
    """Weights and optimizer states by parameter."""

    fragments: dict[str, list[tuple[Tensors, int, int]]] = field(default_factory=dict)
    """Name -> its pieces in order: (flat tensors by key, where it begins in them, number of elements)."""
    steps: dict[str, float] = field(default_factory=dict)
    """Name -> number of updates that its optimizer state has had."""
    groups: dict[str, int] = field(default_factory=dict)
    """Name -> number of its group; plain PyTorch keeps a group that has no parameters, DeepSpeed does not."""
    rates: list[float] = field(default_factory=list)
    """Learning rate of each group."""
    engine: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's counters, loss scaler and scheduler; empty for plain PyTorch."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def numel(self, name: str) -> int:
        """Elements of a parameter; 0 where the checkpoint lacks it."""
        return sum(numel for _, _, numel in self.fragments.get(name, []))

    def keys(self, name: str) -> list[str]:
        """Keys of the states that are saved of a parameter."""
        # Every piece of a parameter has the same states.
        tensors, _, _ = self.fragments[name][0]
        return list(tensors)

    def piece(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements start to stop of one parameter, flat."""
        parts, begin = [], 0
        for tensors, offset, numel in self.fragments[name]:
            low, high = max(start - begin, 0), min(stop - begin, numel)
            if low < high:
                parts.append(tensors[key][offset + low : offset + high])
            begin += numel
        return torch.cat(parts) if parts else torch.empty(0)


def read_writer(checkpoint: Path) -> dict[str, Any]:
    """Ranks, ZeRO stage, layout and sequences per step of what wrote a checkpoint (ValueError: its manifest is damaged)."""
    return read_manifest(checkpoint)["made_by"]


def loads_directly(writer: dict[str, Any], reader: dict[str, Any]) -> bool:
    """Whether DeepSpeed or Trainer loads a checkpoint without resharding: equal layout, or states that were not sharded.

    Args:
        writer: of the checkpoint, see read_writer; empty where it is not known.
        reader: the same for this run.
    """
    if not writer:
        return True
    if "zero" not in writer or writer["zero"] != reader["zero"]:
        return False
    is_sharded = writer["zero"] not in (None, 0)
    # A checkpoint without a recorded layout counts as one of this run's layout.
    same_layout = writer.get("ranks") == reader["ranks"] and writer.get("layout", reader["layout"]) == reader["layout"]
    return same_layout or not is_sharded


def read_states(checkpoint: Path, names: list[str]) -> CheckpointStates:
    """Open a checkpoint whose files have been verified; only what says where things are is read yet.

    Args:
        names: the trained parameters in the optimizer's order, by which states that are not sharded are numbered.

    Raises:
        UserError: it is incomplete, or its states cannot be resharded.
    """
    # Pickles are opened below: callers have checked them with runs.checkpoint_integrity.find_damage.
    if not is_complete(checkpoint):
        raise UserError("DSR272", f"{checkpoint} is incomplete (a save was cut off)")
    if (checkpoint / UNIVERSAL).is_file():
        return _read_universal(checkpoint)
    stage = read_writer(checkpoint).get("zero")
    return _read_plain(checkpoint, names) if stage is None else _read_engine(checkpoint, stage, names)


def _read_engine(checkpoint: Path, stage: int, names: list[str]) -> CheckpointStates:
    """Read what DeepSpeed's engine saved."""
    folder = _engine_folder(checkpoint)
    model = _load(_files_by_rank(folder, "*model_states.pt")[0])
    if model.get("ds_config", {}).get("zero_optimization", {}).get("round_robin_gradients"):
        raise UserError("DSR273", f"{checkpoint}: {ROUND_ROBIN}")
    if stage == 0:
        if "param_groups" not in model["optimizer"]:
            raise UserError("DSR273", f"{checkpoint}: {WRAPPED}")
        saved = _read_unsharded(names, model["optimizer"], model["module"].__getitem__)
    else:
        files = _files_by_rank(folder, "*zero_pp_rank_*optim_states.pt")
        shards = [_load(path)["optimizer_state_dict"] for path in files]
        saved = _read_zero3(shards, model["param_shapes"]) if stage == 3 else _read_zero12(shards)
        saved.engine["loss_scaler"] = _numbers_of(shards[0].get("loss_scaler"))
    saved.engine |= {key: model[key] for key in COUNTERS} | {"lr_scheduler": model.get("lr_scheduler")}
    # Parameters are in the shards in fp32; of the module only buffers are taken.
    buffers = set(model.get("buffer_names") or ())
    saved.buffers = {name: tensor for name, tensor in model["module"].items() if name in buffers}
    return saved


def _numbers_of(scaler: Any | None) -> dict[str, float]:
    """Numeric fields of a loss scaler."""
    fields = vars(scaler) if scaler else {}
    return {name: value for name, value in fields.items() if isinstance(value, (int, float))}


def _engine_folder(checkpoint: Path) -> Path:
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    if (folder / "offloaded_tensors").is_dir():
        raise UserError(
            "DSR273",
            f"{checkpoint}: NVMe offload saves its swap files as they are, and they cannot be resharded. Resume it on as "
            "many ranks as wrote it, under the same ZeRO JSON",
        )
    return folder


def _files_by_rank(folder: Path, pattern: str) -> list[Path]:
    """Files of all ranks, rank 0 first."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _load(path: Path) -> dict[str, Any]:
    """Map a file of DeepSpeed's into memory; its pickles hold objects of its own, which weights_only would refuse."""
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _flatten(owner: str, state: dict[str, Any], weight: torch.Tensor) -> tuple[Tensors, float]:
    """The flat tensors of one piece of optimizer state, and its step.

    Raises:
        UserError: the optimizer keeps something that does not have one value per element.
    """
    tensors: Tensors = {WEIGHT: weight.flatten()}
    step = 0.0
    for key, value in state.items():
        # A tensor of torch's optimizers, a number of DeepSpeed's.
        if key == "step":
            step = float(value)
        # A shard may be padded; a smaller state, such as Adafactor's rows and columns, belongs to no single element.
        elif torch.is_tensor(value) and value.numel() >= weight.numel():
            tensors[key] = value.flatten()
        else:
            raise UserError(
                "DSR274",
                f"the optimizer does not keep {key} of {owner} element by element, so its state cannot be resharded: "
                "resume with as many ranks and the ZeRO stage that wrote it",
            )
    return tensors, step


def _read_zero12(shards: list[dict[str, Any]]) -> CheckpointStates:
    """ZeRO-1 and 2: each group is one long tensor, of which every rank holds an equal part."""
    saved = CheckpointStates(rates=[group["lr"] for group in shards[0]["base_optimizer_state"]["param_groups"]])
    for shard in shards:
        for group, mapping in enumerate(shard["param_slice_mappings"]):
            state = shard["base_optimizer_state"]["state"].get(group, {})
            tensors, step = _flatten(f"group {group}", state, shard["single_partition_of_fp32_groups"][group])
            for name, address in mapping.items():
                saved.fragments.setdefault(name, []).append((tensors, address.start, address.numel))
                saved.steps[name], saved.groups[name] = step, group
    return saved


def _read_zero3(shards: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]) -> CheckpointStates:
    """ZeRO-3: every rank holds an equal, padded part of each parameter; a group is cut into sub groups."""
    groups = shards[0]["optimizer_state_dict"]["param_groups"]
    saved = CheckpointStates(rates=[group["lr"] for group in groups])
    group_of = {number: group for group, options in enumerate(groups) for number in options["params"]}
    for rank, shard in enumerate(shards):
        for sub_group, names in enumerate(shapes):
            state = shard["optimizer_state_dict"]["state"].get(sub_group, {})
            tensors, step = _flatten(f"group {sub_group}", state, shard["fp32_flat_groups"][sub_group])
            offset = 0
            for name, shape in names.items():
                # The files do not record offsets: DeepSpeed pads each parameter to equal shares of all ranks.
                share = math.ceil(shape.numel() / len(shards))
                # The last ranks may hold nothing but padding.
                numel = max(0, min(share, shape.numel() - rank * share))
                saved.fragments.setdefault(name, []).append((tensors, offset, numel))
                saved.steps[name], saved.groups[name] = step, group_of[sub_group]
                offset += share
    return saved


def _read_plain(checkpoint: Path, names: list[str]) -> CheckpointStates:
    """Plain PyTorch: the optimizer's file, and the weights as transformers or peft saves them."""
    optimizer = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    files = [safe_open(path, "pt") for path in sorted(checkpoint.glob("*.safetensors"))]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def weight(name: str) -> torch.Tensor:
        # peft saves an adapter without its name.
        saved_name = name if name in file_of else name.replace(".default.", ".")
        if saved_name not in file_of:
            raise UserError("DSR275", f"{checkpoint} has no weights of {name}: it was written by another model")
        return file_of[saved_name].get_tensor(saved_name)

    return _read_unsharded(names, optimizer, weight)


def _read_unsharded(names: list[str], optimizer: dict[str, Any], weight: Callable[[str], torch.Tensor]) -> CheckpointStates:
    """Read states that an optimizer numbers in the order of its groups."""
    saved = CheckpointStates(rates=[group["lr"] for group in optimizer["param_groups"]])
    numbers = {number: index for index, group in enumerate(optimizer["param_groups"]) for number in group["params"]}
    if len(numbers) != len(names):
        raise UserError("DSR275", f"the checkpoint's optimizer has {len(numbers)} parameters, and this run's {len(names)}")
    for name, (number, group) in zip(names, numbers.items(), strict=True):
        saved.groups[name] = group
        value = weight(name)
        tensors, saved.steps[name] = _flatten(name, optimizer["state"].get(number, {}), value)
        saved.fragments[name] = [(tensors, 0, value.numel())]
    return saved


def _read_universal(folder: Path) -> CheckpointStates:
    """Read what `dsrecipes reshape` wrote: one safetensors file or more for each key."""
    index = json.loads((folder / UNIVERSAL).read_text(encoding="utf-8"))
    saved = CheckpointStates(steps=index["steps"], groups=index["groups"], rates=index["rates"], engine=index["engine"])
    for key in index["keys"]:
        for path in sorted(folder.glob(f"{key}-*.safetensors")):
            file = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                numel = math.prod(file.get_slice(name).get_shape())
                tensors, _, _ = saved.fragments.setdefault(name, [({}, 0, numel)])[0]
                tensors[key] = _FileTensor(file, name)
    for path in folder.glob("buffers.safetensors"):
        with safe_open(path, "pt") as file:
            saved.buffers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return saved


def layout_independent_files(checkpoint: Path) -> Iterable[Path]:
    """Files other than weights and optimizer state, which fit any layout: schedule, Trainer's state, random number states."""
    patterns = ("trainer_state.json", "progress.json", "scheduler.pt", "rng_state*.pth", "scaler.pt")
    return (path for pattern in patterns for path in sorted(checkpoint.glob(pattern)))
