"""On which ranks and device, in which precision, batch and engine does a run train? Decided before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from dsrecipes.config.batch import BATCH_KEYS, MICRO, Batch, changed_defaults, divide_batch, largest_divisor
from dsrecipes.config.find import find_zero
from dsrecipes.config.schema import Config, ModelConfig
from dsrecipes.errors import UserError, coded, plural
from dsrecipes.launch.environment import Launch, Ranks, complete_ranks, hide_accelerators, read_launch, retain_freed_memory
from dsrecipes.launch.task_ranks import idle_tasks_note
from dsrecipes.zero.blocks import check_blocks
from dsrecipes.zero.checkpoint_states import loads_directly, read_writer
from dsrecipes.zero.internals import import_muon_uncompiled
from dsrecipes.zero.limits import check_accelerators, check_precision, check_zeropp
from dsrecipes.zero.process import computes_bf16, describe_hardware, probe_deepspeed, set_threads, use_single_process
from dsrecipes.zero.resolve import TrainerValues, ZeroConfig, check_with_deepspeed, read_zero, resolve


@dataclass
class RunSetup:
    """What was requested, brought together with what the machine has."""

    ranks: Ranks
    device: str
    precision: str
    zero: ZeroConfig | None
    """None: plain PyTorch."""
    fallback: str | None
    """Why DeepSpeed was requested and is not used."""
    micro: int
    """Sequences of a micro batch."""
    accumulation: int
    """Micro batches of a step on each rank."""
    engine: dict[str, Any] = field(default_factory=dict)
    """The resolved ZeRO JSON; empty with plain PyTorch."""
    notes: list[str] = field(default_factory=list)
    """Lines for the header, in the order in which things are decided."""

    def dtype(self, model: ModelConfig) -> torch.dtype:
        """Dtype of the weights: fp32 where plain PyTorch trains all of them under autocast, else the run's precision."""
        if self.precision == "fp32" or (self.zero is None and model.lora_r == 0):
            return torch.float32
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def resolve_zero(self, config: Config, model: PretrainedConfig) -> dict[str, Any] | None:
        """Resolve the engine's JSON for Trainer (UserError: it contradicts the run); None with plain PyTorch."""
        if self.zero is None:
            return None
        values = TrainerValues(self.micro, self.accumulation, self.ranks.world, self.precision, config.train)
        self.engine = resolve(self.zero, model, values, self.notes)
        check_with_deepspeed(self.engine, self.zero.path)
        check_blocks(self.engine, self.zero.path, self.device != "cpu")
        if "optimizer" in self.engine:
            self.notes += _idle_values(config, self.engine["optimizer"])
        return self.engine

    @property
    def batch(self) -> int:
        """Sequences of a step, over all ranks."""
        return self.micro * self.accumulation * self.ranks.world

    def optimizer(self, requested: str) -> str:
        """The optimizer in words, and where its states are."""
        name = self.engine.get("optimizer", {}).get("type", requested)
        return f"{name}, states offloaded" if self.zero and self.zero.offloads_optimizer else name

    def name(self) -> str:
        """The engine in words."""
        return f"DeepSpeed ZeRO-{self.zero.stage} ({self.zero.path.name})" if self.zero else "plain PyTorch"

    def made_by(self) -> dict[str, Any]:
        """What a checkpoint records of the setup that writes it."""
        stage, layout = (self.zero.stage, self.zero.layout) if self.zero else (None, None)
        return {
            "ranks": self.ranks.world,
            "zero": stage,
            "sequences": self.batch,
            "layout": layout,
            "hardware": describe_hardware(self.device),
        }

    def check_checkpoint(self, checkpoint: Path, train: dict[str, Any]) -> None:
        """Keep the steps of a checkpoint as large as they were, and note if its states are resharded.

        Raises:
            UserError: its sequences a step do not divide among these ranks, or its states cannot be resharded.
        """
        made, here = read_writer(checkpoint), self.made_by()
        # with other ranks or another stage, equality bit for bit is not promised on the same hardware either
        bit_for_bit = all(made.get(key) == here[key] for key in ("ranks", "zero"))
        if bit_for_bit and made.get("hardware", here["hardware"]) != here["hardware"]:
            self.notes.append(
                f"checkpoint written on {made['hardware']}, resumed on {here['hardware']}: equal up to rounding, not bit for bit"
            )
        if made.get("ranks", here["ranks"]) != here["ranks"]:
            self._keep_batch(checkpoint, made, train)
        if loads_directly(made, here):
            return
        if self.zero and self.zero.uses_nvme:
            raise UserError(
                "DSR393",
                f"checkpoint {checkpoint} was written by {_describe_writer(made)}, and NVMe offload loads only its own "
                "checkpoints: resume under another ZeRO JSON, such as --deepspeed zero3_offload",
            )
        self.notes.append(f"checkpoint of {_describe_writer(made)} resharded for {_describe_writer(here)}")

    def _keep_batch(self, checkpoint: Path, made: dict[str, Any], train: dict[str, Any]) -> None:
        """Give another number of ranks the same sequences a step: by accumulation, else by a smaller micro batch."""
        world, total = self.ranks.world, made.get("sequences")
        if total is None:
            raise UserError(
                "DSR394",
                f"checkpoint {checkpoint} was written by {_describe_writer(made)} and does not say how many sequences a step "
                f"had, so it cannot resume on {plural(world, 'rank')}: resume as it was written",
            )
        if train["global_batch_size"] not in (None, total):
            return
        if total % world:
            suitable = [str(ranks) for ranks in range(1, min(total, 2 * world) + 1) if total % ranks == 0]
            raise UserError(
                "DSR394",
                f"checkpoint {checkpoint} was written with {plural(total, 'sequence')} a step, which {world} ranks cannot "
                f"share: resume on {' or '.join(suitable)} ranks",
            )
        share = total // world
        # not larger than requested, which may not fit into memory
        self.micro = largest_divisor(share, self.micro)
        self.accumulation = share // self.micro

    def check_engine(self, engine: Any) -> None:
        """Compare the started engine's stage and precision with what was requested (UserError)."""
        assert self.zero is not None
        stage, precision = engine.zero_optimization_stage(), "fp32"
        if engine.bfloat16_enabled():
            precision = "bf16"
        elif engine.fp16_enabled():
            precision = "fp16"
        if stage != self.zero.stage or precision != self.precision:
            raise UserError(
                "DSR395",
                f"requested ZeRO-{self.zero.stage} in {self.precision}, but the engine runs ZeRO-{stage} in {precision}: "
                "check the ZeRO JSON's stage and fp16 and bf16 sections",
            )


def _describe_writer(made: dict[str, Any]) -> str:
    """`2 ranks, ZeRO-3`."""
    if "zero" not in made:
        return "any number of ranks"
    engine = "plain PyTorch" if made["zero"] is None else f"ZeRO-{made['zero']}"
    return f"{plural(made['ranks'], 'rank')}, {engine}"


def _idle_values(config: Config, optimizer: dict[str, Any]) -> list[str]:
    """Note values that the user gave and that the optimizer block of the ZeRO JSON does not take."""
    params = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps", "weight_decay": "weight_decay"}
    return [
        coded("DSR386", f"{key} has no effect: the optimizer is {optimizer['type']} ({config.own[key]})")
        for key, name in params.items()
        if key in config.own and name not in optimizer["params"]
    ]


def resolve_setup(config: Config) -> RunSetup:
    """Decide on ranks, device, engine, precision and batch by the launcher's environment and the configuration.

    Raises:
        UserError: launcher and configuration contradict each other, or request what this machine does not have.
    """
    launch = read_launch(os.environ, find_zero(str(config.train["deepspeed"] or "none")))
    # before anything asks for an accelerator: torch reads CUDA_VISIBLE_DEVICES only once
    if config.train["use_cpu"] or launch.use_cpu:
        hide_accelerators()
    idle = idle_tasks_note(os.environ)
    ranks = complete_ranks(os.environ)
    device = "cpu" if config.train["use_cpu"] or launch.use_cpu else _accelerator()
    if device == "cpu" and not (config.train["use_cpu"] or launch.use_cpu):
        check_accelerators()
    zero, fallback, zero_notes = _engine(config, launch)
    if device == "cpu":
        set_threads(ranks, os.environ)
        retain_freed_memory()
    elif ranks.local_world > torch.accelerator.device_count():
        raise UserError(
            "DSR396",
            f"{plural(ranks.local_world, 'rank')} on this machine, but {plural(torch.accelerator.device_count(), f'{device} device')}: "
            "start no more ranks than devices, or give --use_cpu true",
        )
    # DeepSpeed needs a process group, also of one rank
    if zero is None and ranks.world == 1:
        use_single_process(device)
    batch, changed = _batch(config, ranks.world)
    precision = _precision(config, launch, device)
    if zero is not None:
        check_precision(zero.stage, precision, chosen=bool(config.train["fp16"] or launch.precision))
        check_zeropp(zero.path, zero.json.get("zero_optimization", {}), ranks.world, device)
    notes = [*config.layers.notes(), *filter(None, [idle, changed]), *zero_notes, *_bf16_hint(config, device, precision)]
    return RunSetup(ranks, device, precision, zero, fallback, batch.micro, batch.accumulation, notes=notes)


def _bf16_hint(config: Config, device: str, precision: str) -> list[str]:
    if device != "cpu" or precision != "fp32" or {"bf16", "fp16"} & set(config.given) or not computes_bf16():
        return []
    return ["this CPU has AVX-512 BF16: --bf16 true trained 1.7 times as fast in a run of ours; fp32 is the default"]


def _batch(config: Config, world: int) -> tuple[Batch, str | None]:
    """The batch, and a note on the defaults that were changed; a run that resumes may need a smaller micro batch on more ranks."""
    values = {key: config.train[key] for key in BATCH_KEYS}
    given = config.layers.by_user()
    # check_checkpoint may have to make it smaller, so it is no contradiction here
    if config.train["resume_from_checkpoint"] and values["global_batch_size"]:
        given.pop(MICRO, None)
    batch = divide_batch(values, given, world)
    return batch, changed_defaults(values, given, batch)


def _accelerator() -> str:
    """The kind of device that DeepSpeed can train on here; Apple's mps, on which it cannot, counts as cpu."""
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if current is None or current.type == "mps" else current.type


def _engine(config: Config, launch: Launch) -> tuple[ZeroConfig | None, str | None, list[str]]:
    """The ZeRO JSON, or why DeepSpeed is not used although it was requested; and notes on the JSON."""
    path = find_zero(str(config.train["deepspeed"] or "none"))
    if path is None:
        if launch.deepspeed:
            raise UserError(
                "DSR397", "`accelerate launch --use_deepspeed` and --deepspeed none contradict each other: drop one"
            )
        if config.train["require_deepspeed"]:
            raise UserError("DSR397", "--require_deepspeed and --deepspeed none contradict each other: drop one")
        # a DeepSpeed that does not import is hidden from accelerate, which would import it
        probe_deepspeed(nvme=False)
        return None, None, []
    zero = read_zero(path)
    reason = probe_deepspeed(zero.uses_nvme)
    if reason is None:
        # before Trainer imports DeepSpeed, which would import torch's compiler for an unused optimizer
        if not zero.uses_muon:
            import_muon_uncompiled()
        return zero, None, zero.notes
    if config.train["require_deepspeed"] or launch.deepspeed:
        raise UserError(
            "DSR398",
            f"DeepSpeed cannot start: {reason}. Install it (`pip install 'deepspeed<0.20'`), or drop --require_deepspeed to run on "
            "plain PyTorch",
        )
    # their values replace those of the flags, so plain PyTorch would train with others than the user gave
    blocks = [key for key in ("optimizer", "scheduler") if key in zero.json]
    if blocks:
        raise UserError(
            "DSR398",
            f"{path}: its {' and '.join(blocks)} need DeepSpeed, which cannot start: {reason}. Install it "
            "(`pip install 'deepspeed<0.20'`), or give --deepspeed none and the values as flags",
        )
    return None, reason, []


def _precision(config: Config, launch: Launch, device: str) -> str:
    """The requested precision, else fp32 on CPU and bf16 or fp16 on a GPU."""
    requested = [name for name in ("bf16", "fp16") if config.train[name]]
    zero = config.layers.zero_json()
    explicit = {key for key in ("bf16", "fp16") if key in config.given and config.given[key] != zero.origin}
    # a flag such as --bf16 false asks for fp32, whatever accelerate's configuration says
    precision = "fp32" if explicit else launch.precision
    if requested:
        precision = requested[0]
    if precision is None:
        # a ZeRO JSON may turn one off and leave the other to the run
        allowed = [name for name in ("bf16", "fp16") if zero.values.get(name) is not False]
        if device != "cuda" or not allowed:
            return "fp32"
        # an older GPU only emulates bf16, slowly
        if "bf16" in allowed and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if "fp16" in allowed else "fp32"
    if precision == "fp16" and device == "cpu":
        raise UserError("DSR399", "fp16 needs a GPU; on a CPU give --fp16 false (fp32) or --bf16 true")
    return precision
