"""Which settings need less memory, when a rank has run out of it?"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from dsrecipes.config.schema import Config
from dsrecipes.model.task import count_parameters
from dsrecipes.train.setup import RunSetup


@dataclass(frozen=True)
class Load:
    """What decides how much memory a rank needs; sizes in bytes."""

    micro: int
    accumulation: int
    world: int
    max_length: int
    checkpointing: bool
    stage: int | None
    offloads: bool
    lora_r: int
    in_4bit: bool
    on_device: bool
    """Whether the memory that ran out is an accelerator's."""
    weights: int = 0
    """Bytes of the whole model; 0 while it is not known."""
    states: int = 0
    """Bytes of gradients and optimizer states of all that is trained."""
    training: bool = True
    """False while the model is loaded: there is no batch yet."""


def remedies(load: Load) -> list[str]:
    """List what to change, the cheapest first, with this run's numbers; what is on already or would not help is left out."""
    return [*_smaller_batches(load), *_divided_states(load), *_fewer_trained(load)]


def _smaller_batches(load: Load) -> list[str]:
    if not load.training:
        return []
    changes = []
    if load.micro > 1:
        # an odd number has no half that keeps the sequences a step
        half = load.micro // 2 if load.micro % 2 == 0 else 1
        accumulation = load.accumulation * load.micro // half
        now = f"now {load.micro} and {load.accumulation}"
        if load.micro % 2 == 0:
            now += f"; the same {load.micro * load.accumulation * load.world} sequences a step"
        changes.append(f"--per_device_train_batch_size {half} --gradient_accumulation_steps {accumulation} ({now})")
    if not load.checkpointing:
        changes.append("--gradient_checkpointing true (activations of one layer at a time; a third slower)")
    # below, rows would be dropped for little memory
    if load.max_length >= 128:
        changes.append(f"--max_length {load.max_length // 2} (now {load.max_length}; longer rows are dropped)")
    return changes


def _divided_states(load: Load) -> list[str]:
    changes = []
    if load.world > 1 and (load.stage or 0) < 3:
        share = f" (weights {_gb(load.weights)} a rank, then {_gb(load.weights / load.world)})" if load.weights else ""
        changes.append(f"--deepspeed zero3{share}")
    # offload moves optimizer states to host memory: no help where that ran out, or before there are states
    if load.on_device and not load.offloads and load.training:
        # ds_configs/ has an offload variant of stages 1 to 3
        stage = load.stage if load.stage in (1, 2, 3) else 2
        share = f" ({_gb(load.states / load.world)} of optimizer states a rank go to host memory)" if load.states else ""
        changes.append(f"--deepspeed zero{stage}_offload{share}")
    return changes


def _fewer_trained(load: Load) -> list[str]:
    if not load.lora_r:
        share = f" (gradients and optimizer states are {_gb(load.states)} now)" if load.states else ""
        return [f"--lora_r 16{share}"]
    if not load.in_4bit:
        share = f" (weights {_gb(load.weights)}, then about a quarter)" if load.weights else ""
        return [f"--load_in_4bit true{share}"]
    return []


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def out_of_memory(load: Load, rank: int, error: BaseException, where: str) -> str:
    """Compose the message: what ran out, and what to change in order."""
    what = "device memory" if load.on_device else "host memory"
    steps = "".join(f"\n  {number}. {change}" for number, change in enumerate(remedies(load), 1))
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    advice = f" What to change, in this order:{steps}" if steps else " Take a smaller model or more memory."
    return f"rank {rank} ran out of {what} {where}: {first_line[:160]}.{advice}"


def load_of(config: Config, setup: RunSetup, model: PreTrainedModel | None) -> Load:
    """The numbers of a run; `model` is None while it is not loaded."""
    trained, frozen = count_parameters(model) if model is not None else (0, 0)
    width = 4 if setup.precision == "fp32" else 2
    # in 16-bit training 12 bytes (Rajbhandari et al., arXiv:1910.02054, section 3.1) and the gradient;
    # in fp32 the gradient and Adam's two moments
    bytes_of_states = 14 if width == 2 else 12
    return Load(
        micro=setup.micro,
        accumulation=setup.accumulation,
        world=setup.ranks.world,
        max_length=config.data.max_length,
        checkpointing=bool(config.train["gradient_checkpointing"]),
        stage=setup.zero.stage if setup.zero else None,
        offloads=bool(setup.zero and setup.zero.offloads_optimizer),
        lora_r=config.model.lora_r,
        in_4bit=config.model.load_in_4bit,
        on_device=setup.device != "cpu",
        weights=(trained + frozen) * width,
        states=trained * bytes_of_states,
        training=model is not None,
    )
