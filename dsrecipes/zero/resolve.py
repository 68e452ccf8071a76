"""A ZeRO JSON with every `auto` filled in, or one message that shows both values where it contradicts the run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dsrecipes.data.prepare import cache_root
from dsrecipes.errors import UserError, nearest
from dsrecipes.find import parse_json, read_text

Json = dict[str, Any]

_KNOWN = frozenset(
    "activation_checkpointing aio allgather_bucket_size amp autotuning bf16 bfloat16 checkpoint comms_logger "
    "communication_data_type compile compression_training csv_monitor curriculum_learning data_efficiency data_types "
    "dataloader_drop_last disable_allgather dump_state elasticity eigenvalue flops_profiler fp16 fp32_allreduce gradient_accumulation_dtype "
    "gradient_accumulation_steps gradient_clipping gradient_predivide_factor graph_harvesting hybrid_engine memory_breakdown "
    "monitor_config nebula optimizer pipeline pld prescale_gradients progressive_layer_drop scheduler seq_parallel_communication_data_type "
    "sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size "
    "train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage wall_clock_breakdown wandb "
    "weight_quantization zero_allow_comm_data_type_fp32 zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization".split()
)
"""Top-level keys (https://www.deepspeed.ai/docs/config-json/ and deepspeed 0.19.8, runtime/constants.py)."""


@dataclass(frozen=True)
class Zero:
    """A ZeRO JSON as read: stage 0 to 3, where optimizer states go, and the JSON itself."""

    path: Path
    json: Json

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

    def precision(self) -> str | None:
        """bf16 or fp16 where the JSON turns one on, else None."""
        on = [name for name in ("bf16", "fp16") if _flag(self.json.get(name, {}).get("enabled")) is True]
        if len(on) > 1:
            raise UserError(f"{self.path}: bf16.enabled and fp16.enabled are both true; keep one")
        return on[0] if on else None


def _flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def read_zero(path: Path) -> Zero:
    """Read and check a ZeRO JSON on its own.

    Raises:
        UserError: malformed (line and column), an unknown key (with the nearest known one), a stage that is none,
            or a part that its stage does not have.
    """
    config = parse_json(read_text(path), str(path))
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    for key in config:
        if key not in _KNOWN:
            raise UserError(f"{path}: DeepSpeed has no key {key!r}{nearest(key, _KNOWN)}")
    for key in ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{path}: {key} must be an object")
    for key in ("optimizer", "scheduler"):
        part = config.get(key, {})
        if not isinstance(part.get("params", {}), dict) or not isinstance(part.get("type", ""), str):
            raise UserError(f"{path}: {key} must have a type (text) and params (an object)")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or str(stage) not in ("0", "1", "2", "3"):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; choose 0, 1, 2 or 3")
    zero["stage"] = int(stage)
    for part, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        part_config = zero.get(part) or {}
        if not isinstance(part_config, dict):
            raise UserError(f"{path}: zero_optimization.{part} must be an object with a device")
        if part_config.get("device", "none") != "none" and zero["stage"] not in stages:
            raise UserError(
                f"{path}: zero_optimization.{part} needs stage {' or '.join(map(str, stages))}, and the stage is {stage}: "
                + (
                    "only ZeRO-3 divides parameters; remove offload_param or set stage 3"
                    if part == "offload_param"
                    else "set another stage"
                )
            )
    result = Zero(path, config)
    result.precision()
    return result


def check_zero_keys(zero: Zero) -> None:
    """Check zero_optimization against the installed DeepSpeed; raises UserError for a typo or a wrong type."""
    import pydantic
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    section = zero.json.get("zero_optimization", {})
    for key in section:
        if key not in known:
            raise UserError(f"{zero.path}: zero_optimization has no key {key!r}{nearest(key, known)}")
    try:
        DeepSpeedZeroConfig(**_without_auto(section))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{zero.path}: zero_optimization.{where}: {first['msg']} (found {first['input']!r})") from None


def _without_auto(section: Json) -> Json:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value for key, value in section.items() if value != "auto"
    }


@dataclass(frozen=True)
class Numbers:
    """What Trainer knows and a ZeRO JSON may repeat."""

    micro: int
    accumulation: int
    world: int
    precision: str
    train: Json
    given: dict[str, str]

    def pairs(self) -> Iterator[tuple[str, str, Any]]:
        """(key in the JSON, flag, value of the run)."""
        train = self.train
        yield "train_micro_batch_size_per_gpu", "per_device_train_batch_size", self.micro
        yield "gradient_accumulation_steps", "gradient_accumulation_steps", self.accumulation
        yield "train_batch_size", "global_batch_size", self.micro * self.accumulation * self.world
        yield "gradient_clipping", "max_grad_norm", train["max_grad_norm"]
        yield "optimizer.params.lr", "learning_rate", train["learning_rate"]
        yield "optimizer.params.betas", "adam_beta1", [train["adam_beta1"], train["adam_beta2"]]
        yield "optimizer.params.eps", "adam_epsilon", train["adam_epsilon"]
        yield "optimizer.params.weight_decay", "weight_decay", train["weight_decay"]
        yield "scheduler.params.warmup_max_lr", "learning_rate", train["learning_rate"]
        yield "fp16.enabled", "fp16", self.precision == "fp16"
        yield "bf16.enabled", "bf16", self.precision == "bf16"


def resolve(zero: Zero, model: PretrainedConfig, numbers: Numbers, accelerator: bool, notes: list[str]) -> Json:
    """The JSON with its `auto` values filled in; the scheduler's step counts stay for Trainer, which knows them.

    What had to be changed for a run that leaves a model is told in `notes`.

    Raises:
        UserError: values that contradict the run, each with both numbers and where they come from.
    """
    config = json.loads(json.dumps(zero.json))
    _add_what_trainer_knows(config)
    clashes = []
    for key, flag, value in numbers.pairs():
        node, name = _node(config, key)
        if node is None or name not in node:
            continue
        if node[name] == "auto":
            node[name] = value
        elif not _same(node[name], value):
            clashes.append(
                f"{key} is {node[name]} in {zero.path}, but {flag} is {value} ({numbers.given.get(flag, 'default or derived')})"
            )
        else:
            node[name] = value
    if clashes:
        batch = ""
        if any("batch" in clash or "accumulation" in clash for clash in clashes):
            total = numbers.micro * numbers.accumulation * numbers.world
            batch = f" The run's batch: {total} = micro {numbers.micro} x accumulation {numbers.accumulation} x ranks {numbers.world}."
        raise UserError("; ".join(clashes) + f'.{batch} Set the JSON\'s value to "auto", or change the flag')
    section = config.get("zero_optimization", {})
    _fill_zero(section, model)
    if zero.stage == 3 and section.get("stage3_gather_16bit_weights_on_model_save") is not True:
        section["stage3_gather_16bit_weights_on_model_save"] = True
        notes.append(f"{zero.path} does not gather the weights on saving; turned on, else no loadable model would be left")
    ds_adam = accelerator and has_compiler()
    if zero.offloads_optimizer and not ds_adam:
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    optimizer = config.get("optimizer", {})
    if optimizer.get("type", "").lower() in ("adam", "adamw") and not (zero.offloads_optimizer and ds_adam):
        # DeepSpeed's own Adam compiles for a minute or more at first use, torch's does not
        optimizer.setdefault("params", {}).setdefault("torch_adam", True)
    return config


def _add_what_trainer_knows(config: Json) -> None:
    """Keys left out mean `auto`: without them DeepSpeed does not start, clips nothing and computes in fp32."""
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        config.setdefault(key, "auto")
    for precision in ("fp16", "bf16"):
        config.setdefault(precision, {}).setdefault("enabled", "auto")


def _node(config: Json, key: str) -> tuple[Json | None, str]:
    *parents, name = key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), name


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, bool):
        return _flag(theirs) is ours
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(theirs) == len(ours) and all(map(_same, theirs, ours))
    try:
        return float(theirs) == float(ours)
    except (TypeError, ValueError, OverflowError):
        return False


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


def has_compiler() -> bool:
    """Whether DeepSpeed could compile its CPU Adam here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++")) and bool(shutil.which("ninja"))
