"""How a ZeRO JSON is read, checked, and filled in with the run's values."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dsrecipes.config.zero_values import read_zero_json
from dsrecipes.errors import UserError, coded
from dsrecipes.io.paths import cache_root
from dsrecipes.zero.blocks import fill_optimizer, fill_scheduler, fixed_steps
from dsrecipes.zero.lint import lint

Json = dict[str, Any]
_FILLED_BY_TRAINER = tuple(f"scheduler.params.{key}" for key in ("warmup_num_steps", "total_num_steps", "warmup_min_lr"))
"""Values that transformers fills in when training begins (5.23, integrations/deepspeed.py)."""
_OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""Block -> ZeRO stages that have it."""


@dataclass(frozen=True)
class ZeroConfig:
    """A ZeRO JSON as it was read, with its stage, where states are offloaded to, and notes."""

    path: Path
    json: Json
    notes: list[str] = field(default_factory=list)
    """Keys that were renamed or have no effect, for the header."""

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return int(self.json.get("zero_optimization", {}).get("stage", 0))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states are kept off the accelerator."""
        return self._device("offload_optimizer") != "none"

    @property
    def uses_nvme(self) -> bool:
        """Whether anything is offloaded to a disk."""
        return "nvme" in (self._device("offload_optimizer"), self._device("offload_param"))

    @property
    def uses_muon(self) -> bool:
        """Whether the JSON names DeepSpeed's Muon optimizer."""
        return "muon" in str(self.json.get("optimizer", {}).get("type", "")).lower()

    @property
    def layout(self) -> list[Any]:
        """Settings that decide, with stage and ranks, where a parameter's state is in a checkpoint's files."""
        section = self.json.get("zero_optimization", {})
        return [section.get("sub_group_size"), bool(section.get("round_robin_gradients")), self.uses_nvme]

    def _device(self, part: str) -> str:
        return (self.json.get("zero_optimization", {}).get(part) or {}).get("device", "none")


def read_zero(path: Path) -> ZeroConfig:
    """Read a ZeRO JSON, and check what can be checked without a run.

    Raises:
        UserError: malformed (line and column), an unknown key (with the nearest known one), an invalid stage,
            or a block that its stage does not have.
    """
    config = read_zero_json(path)
    notes = lint(config, path)
    section = config.setdefault("zero_optimization", {"stage": 0})
    stage = section.setdefault("stage", 0)
    if isinstance(stage, bool) or str(stage) not in ("0", "1", "2", "3"):
        raise UserError("DSR259", f"{path}: zero_optimization.stage is {stage!r}; choose 0, 1, 2 or 3")
    section["stage"] = int(stage)
    for block in _OFFLOAD_STAGES:
        _check_offload(block, section, path)
    return ZeroConfig(path, config, notes)


def _check_offload(block: str, section: Json, path: Path) -> None:
    """Check offload_optimizer or offload_param of a zero_optimization section (UserError)."""
    name, options, stage = f"zero_optimization.{block}", section.get(block) or {}, section["stage"]
    if not isinstance(options, dict):
        raise UserError("DSR256", f"{path}: {name} must be an object with a device")
    device = options.get("device", "none")
    # DeepSpeed would drop it, and offload nothing.
    if device == "auto":
        raise UserError("DSR260", f"{path}: {name}.device is 'auto'; choose cpu, nvme or none")
    if device == "nvme" and not options.get("nvme_path"):
        raise UserError("DSR260", f'{path}: {name} has no nvme_path; name a folder of a fast disk, or "auto"')
    stages = _OFFLOAD_STAGES[block]
    if device != "none" and stage not in stages:
        advice = "set another stage"
        if block == "offload_param":
            advice = "only ZeRO-3 shards parameters; remove offload_param or set stage 3"
        needed = " or ".join(map(str, stages))
        raise UserError("DSR261", f"{path}: {name} needs stage {needed}, and the stage is {stage}: {advice}")


def check_with_deepspeed(config: Json, path: Path) -> None:
    """Let the installed DeepSpeed read a resolved JSON, before any weights are loaded (UserError: it refuses it)."""
    import pydantic
    from deepspeed.runtime.config import DeepSpeedConfig

    config = _without_auto(json.loads(json.dumps(config)))
    # It would be compared with the number of ranks that have started so far.
    del config["train_batch_size"]
    try:
        DeepSpeedConfig(config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join([_section_of(config, first["loc"], first["input"]), *map(str, first["loc"])]).lstrip(".")
        raise UserError("DSR262", f"{path}: {key}: {first['msg']} (found {first['input']!r})") from None
    except Exception as error:
        # DeepSpeed raises assertions, KeyError, TypeError and errors of its own.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError("DSR262", f"{path}: DeepSpeed refuses it: {reason}") from error


def _section_of(config: Json, location: tuple[int | str, ...], value: Any) -> str:
    """The block that an error of pydantic is about: the first that holds its key with its value."""
    if not location:
        return ""
    key = location[0]
    for name, block in config.items():
        if isinstance(block, dict) and key in block and (len(location) > 1 or block[key] == value):
            return name
    return ""


def _without_auto(section: Json) -> Json:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value for key, value in section.items() if value != "auto"
    }


@dataclass(frozen=True)
class TrainerValues:
    """Values of Trainer that a ZeRO JSON may repeat."""

    micro: int
    """Sequences of a micro batch on each rank."""
    accumulation: int
    """Micro batches of a step."""
    world: int
    """Number of ranks."""
    precision: str
    """fp32, bf16 or fp16."""
    train: Json
    """The run's training values, including those that the JSON fixes."""


def resolve(zero: ZeroConfig, model: PretrainedConfig, values: TrainerValues, notes: list[str]) -> Json:
    """Fill the run's values into a copy of the JSON; Trainer fills in step counts that a scheduler leaves open.

    Args:
        model: its width decides bucket sizes.
        notes: gets a line on what had to be changed so that the run leaves a model, and on a fixed schedule.
    """
    config = json.loads(json.dumps(zero.json))  # a deep copy
    config |= {
        "train_micro_batch_size_per_gpu": values.micro,
        "gradient_accumulation_steps": values.accumulation,
        "train_batch_size": values.micro * values.accumulation * values.world,
        "gradient_clipping": values.train["max_grad_norm"],
    }
    for precision in ("fp16", "bf16"):
        config.setdefault(precision, {})["enabled"] = values.precision == precision
    section = config["zero_optimization"]
    _fill_zero(section, model)
    if zero.stage == 3 and section.get("stage3_gather_16bit_weights_on_model_save") is not True:
        section["stage3_gather_16bit_weights_on_model_save"] = True
        change = "does not gather the weights on saving; turned on, else no loadable model would be left"
        notes.append(coded("DSR283", f"{zero.path} {change}"))
    # torch's optimizers are as fast on the host, and DeepSpeed's compile for a minute.
    if zero.offloads_optimizer:
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    if "optimizer" in config:
        fill_optimizer(config["optimizer"], values.train)
        if config["optimizer"]["params"].get("torch_adam") is False:
            note = f"{zero.path}: torch_adam false builds DeepSpeed's own Adam, which compiles at first use (minutes)"
            notes.append(coded("DSR284", note))
    if "scheduler" in config:
        fill_scheduler(config["scheduler"], values.train["learning_rate"])
        notes += _fixed_schedule(config, zero)
    dropped = _drop_auto(config, "")
    if dropped:
        keys = ", ".join(dropped)
        notes.append(f'{zero.path}: DeepSpeed\'s default for {keys}, which nothing here fills in for "auto"')
    return config


def _drop_auto(block: Json, path: str) -> list[str]:
    """Remove every "auto" that is left, except a scheduler's step counts; returns their keys."""
    dropped = []
    for key in list(block):
        name = f"{path}.{key}" if path else key
        if isinstance(block[key], dict):
            dropped += _drop_auto(block[key], name)
        elif block[key] == "auto" and name not in _FILLED_BY_TRAINER:
            del block[key]
            dropped.append(name)
    return dropped


def _fixed_schedule(config: Json, zero: ZeroConfig) -> list[str]:
    """A note on a schedule whose length the JSON fixes."""
    steps = fixed_steps(config)
    if not all(isinstance(number, (int, float)) for number in steps.values()):
        # check_blocks refuses it, with a message.
        return []
    if "total_num_steps" in steps:
        total, warmup = steps["total_num_steps"], steps.get("warmup_num_steps", 0)
        no_decay = f"; its warm-up takes {warmup} of them, so it never decays" if total <= warmup else ""
        return [f"{zero.path} fixes the schedule to {total} steps, however long the run is{no_decay}"]
    if "warmup_num_steps" in steps:
        return [f"{zero.path} fixes the warm-up: {steps['warmup_num_steps']} steps, however long the run is"]
    return []


def hidden_size(model: PretrainedConfig) -> int:
    """Width of the model's layers, whatever its configuration calls it."""
    text = model.get_text_config()
    for name in ("hidden_size", "n_embd", "d_model", "dim"):
        if isinstance(getattr(text, name, None), int):
            return getattr(text, name)
    # A model with stages of different widths has a list.
    sizes = getattr(text, "hidden_sizes", None)
    return max(sizes) if sizes else 1024


def _fill_zero(section: Json, model: PretrainedConfig) -> None:
    """Fill in bucket sizes in elements by transformers' rule (5.23, integrations/deepspeed.py), at least a million."""
    square = max(hidden_size(model) ** 2, 1_000_000)
    nvme = str(os.environ.get("DSRECIPES_NVME") or cache_root() / "nvme")
    values = {
        "reduce_bucket_size": square,
        "allgather_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * hidden_size(model),
        # About one transformer block, which activation checkpointing uses twice in a row. DeepSpeed's default of 1e9 makes
        # it search the whole of a smaller model at each module: 58 s in the second step of SmolLM2 with LoRA.
        "stage3_max_reuse_distance": min(16 * hidden_size(model) ** 2, 1_000_000_000),
        "nvme_path": nvme,
    }
    for part in (section, section.get("offload_optimizer") or {}, section.get("offload_param") or {}):
        for key, value in part.items():
            if value == "auto" and key in values:
                part[key] = values[key]
                if key == "nvme_path":
                    Path(nvme).mkdir(parents=True, exist_ok=True)
