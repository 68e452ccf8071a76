"""A ZeRO JSON, read, checked, and filled in with the run's values."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dsrecipes.config.zero_values import read_zero_json
from dsrecipes.errors import UserError
from dsrecipes.io.paths import cache_root
from dsrecipes.zero.blocks import fill_optimizer, fill_scheduler, fixed_steps
from dsrecipes.zero.lint import lint

Json = dict[str, Any]


_FILLED_BY_TRAINER = tuple(f"scheduler.params.{key}" for key in ("warmup_num_steps", "total_num_steps", "warmup_min_lr"))
"""Values that transformers fills in when training begins (integrations/deepspeed.py)."""


@dataclass(frozen=True)
class ZeroConfig:
    """A ZeRO JSON as read: stage 0 to 3, where optimizer states go, and the JSON itself."""

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
        """Whether anything is kept on a disk."""
        return "nvme" in (self._device("offload_optimizer"), self._device("offload_param"))

    @property
    def uses_muon(self) -> bool:
        """Whether the JSON names DeepSpeed's Muon optimizer."""
        return "muon" in str(self.json.get("optimizer", {}).get("type", "")).lower()

    @property
    def layout(self) -> list[Any]:
        """What decides, beside stage and ranks, where a parameter's state lies in a checkpoint's files."""
        section = self.json.get("zero_optimization", {})
        return [section.get("sub_group_size"), bool(section.get("round_robin_gradients")), self.uses_nvme]

    def _device(self, part: str) -> str:
        return (self.json.get("zero_optimization", {}).get(part) or {}).get("device", "none")


def read_zero(path: Path) -> ZeroConfig:
    """Read and check a ZeRO JSON on its own.

    Raises:
        UserError: malformed (line and column), an unknown key (with the nearest known one), a stage that is none,
            or a part that its stage does not have.
    """
    config = read_zero_json(path)
    notes = lint(config, path)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    stage = zero.setdefault("stage", 0)
    if isinstance(stage, bool) or str(stage) not in ("0", "1", "2", "3"):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; choose 0, 1, 2 or 3")
    zero["stage"] = int(stage)
    for part, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        part_config = zero.get(part) or {}
        if not isinstance(part_config, dict):
            raise UserError(f"{path}: zero_optimization.{part} must be an object with a device")
        device = part_config.get("device", "none")
        if device == "auto":  # DeepSpeed would drop it, and offload nothing
            raise UserError(f"{path}: zero_optimization.{part}.device is 'auto'; choose cpu, nvme or none")
        if device == "nvme" and not part_config.get("nvme_path"):
            raise UserError(f'{path}: zero_optimization.{part} has no nvme_path; name a folder of a fast disk, or "auto"')
        if device != "none" and zero["stage"] not in stages:
            raise UserError(
                f"{path}: zero_optimization.{part} needs stage {' or '.join(map(str, stages))}, and the stage is {stage}: "
                + (
                    "only ZeRO-3 divides parameters; remove offload_param or set stage 3"
                    if part == "offload_param"
                    else "set another stage"
                )
            )
    return ZeroConfig(path, config, notes)


def check_with_deepspeed(config: Json, path: Path) -> None:
    """Let the installed DeepSpeed read a resolved JSON, before any weights are loaded (UserError: it refuses it)."""
    import pydantic
    from deepspeed.runtime.config import DeepSpeedConfig

    config = _without_auto(json.loads(json.dumps(config)))
    del config["train_batch_size"]  # it would be compared with the ranks that have started so far
    try:
        DeepSpeedConfig(config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join([_section_of(config, first), *map(str, first["loc"])]).lstrip(".")
        raise UserError(f"{path}: {where}: {first['msg']} (found {first['input']!r})") from None
    except Exception as error:  # assertions, KeyError, TypeError and errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: DeepSpeed refuses it: {reason}") from error


def _section_of(config: Json, error: dict[str, Any]) -> str:
    """The block that a pydantic error is about: the first that holds its key with its value."""
    if not error["loc"]:
        return ""
    key = error["loc"][0]
    blocks = {name: block for name, block in config.items() if isinstance(block, dict) and key in block}
    return next((name for name, block in blocks.items() if len(error["loc"]) > 1 or block[key] == error["input"]), "")


def _without_auto(section: Json) -> Json:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value for key, value in section.items() if value != "auto"
    }


@dataclass(frozen=True)
class TrainerValues:
    """What Trainer knows and a ZeRO JSON may repeat."""

    micro: int
    accumulation: int
    world: int
    precision: str
    train: Json
    """The run's training values, which already hold what the JSON fixes."""


def resolve(zero: ZeroConfig, model: PretrainedConfig, numbers: TrainerValues, notes: list[str]) -> Json:
    """The JSON with the run's values in it; Trainer fills in the step counts of a scheduler that it leaves open.

    `notes` gets what had to be changed so that the run leaves a model, and the length of a fixed schedule.
    """
    config = json.loads(json.dumps(zero.json))
    config |= {
        "train_micro_batch_size_per_gpu": numbers.micro,
        "gradient_accumulation_steps": numbers.accumulation,
        "train_batch_size": numbers.micro * numbers.accumulation * numbers.world,
        "gradient_clipping": numbers.train["max_grad_norm"],
    }
    for precision in ("fp16", "bf16"):
        config.setdefault(precision, {})["enabled"] = numbers.precision == precision
    section = config["zero_optimization"]
    _fill_zero(section, model)
    if zero.stage == 3 and section.get("stage3_gather_16bit_weights_on_model_save") is not True:
        section["stage3_gather_16bit_weights_on_model_save"] = True
        notes.append(f"{zero.path} does not gather the weights on saving; turned on, else no loadable model would be left")
    if zero.offloads_optimizer:  # torch's optimizers are as fast on the host, and DeepSpeed's compile for a minute
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    if "optimizer" in config:
        fill_optimizer(config["optimizer"], numbers.train)
        if config["optimizer"]["params"].get("torch_adam") is False:
            notes.append(f"{zero.path}: torch_adam false builds DeepSpeed's own Adam, which compiles at first use (minutes)")
    if "scheduler" in config:
        fill_scheduler(config["scheduler"], numbers.train["learning_rate"])
        notes += _fixed_schedule(config, zero)
    dropped = _drop_auto(config, "")
    if dropped:
        notes.append(f'{zero.path}: DeepSpeed\'s default for {", ".join(dropped)}, which nothing here fills in for "auto"')
    return config


def _drop_auto(block: Json, path: str) -> list[str]:
    """Remove every "auto" that is left, but for a scheduler's step counts; returns the keys."""
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
    if "total_num_steps" in steps:
        total, warmup = steps["total_num_steps"], steps.get("warmup_num_steps", 0)
        short = f"; its warm-up takes {warmup} of them, so it never decays" if total <= warmup else ""
        return [f"{zero.path} fixes the schedule to {total} steps, however long the run is{short}"]
    if "warmup_num_steps" in steps:
        return [f"{zero.path} fixes the warm-up: {steps['warmup_num_steps']} steps, however long the run is"]
    return []


def hidden_size(model: PretrainedConfig) -> int:
    """Width of the model's layers, whatever its configuration calls it."""
    text = model.get_text_config()
    for name in ("hidden_size", "n_embd", "d_model", "dim"):
        if isinstance(getattr(text, name, None), int):
            return getattr(text, name)
    sizes = getattr(text, "hidden_sizes", None)
    return max(sizes) if sizes else 1024


def _fill_zero(section: Json, model: PretrainedConfig) -> None:
    """Bucket sizes in elements after transformers' rule (integrations/deepspeed.py), at least a million."""
    square = max(hidden_size(model) ** 2, 1_000_000)
    nvme = str(os.environ.get("DSRECIPES_NVME") or cache_root() / "nvme")
    values = {
        "reduce_bucket_size": square,
        "allgather_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * hidden_size(model),
        # About one transformer block, which activation checkpointing uses twice in a row. DeepSpeed's 1e9 makes it
        # search the whole model at each of a smaller model's modules: 58 s in the second step of SmolLM2 with LoRA.
        "stage3_max_reuse_distance": min(16 * hidden_size(model) ** 2, 1_000_000_000),
        "nvme_path": nvme,
    }
    for part in (section, section.get("offload_optimizer") or {}, section.get("offload_param") or {}):
        for key, value in part.items():
            if value == "auto" and key in values:
                part[key] = values[key]
                if key == "nvme_path":
                    Path(nvme).mkdir(parents=True, exist_ok=True)
