"""Can optimizer, schedule, trackers, data loader and compiler be built? Tried on a tiny layer, before weights are loaded.

transformers' own code builds them, so that what would fail minutes later (a missing package, an unknown argument) is one
message now.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer

from dsrecipes.config.train_config import TrainConfig
from dsrecipes.errors import UserError, coded, nearest

_SIDE = 64
"""A 64 x 64 weight is the smallest whose states bitsandbytes keeps in 8 bits."""
_WHOLE = (_SIDE, _SIDE)
"""Shape of the weight that is tried."""


class _Parts(Trainer):
    """Trainer's own construction of optimizer and scheduler, without its data, callbacks and accelerator."""

    def __init__(self, args: TrainConfig, model: nn.Module) -> None:
        self.args, self.model = args, model
        self.optimizer = self.lr_scheduler = self.optimizer_cls_and_kwargs = None


@contextlib.contextmanager
def _refusing(flag: str) -> Iterator[None]:
    """Turn any exception into a UserError that names the flag."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            text = f"no key {text}"
        raise UserError("DSR383", f"{flag}: {text}") from error


def check_parts(args: TrainConfig, steps: int, engine: dict[str, Any] | None, own: dict[str, str]) -> list[str]:
    """Build every part once.

    Args:
        args: the run's arguments.
        steps: optimizer steps of the run.
        engine: the resolved ZeRO JSON, whose optimizer and scheduler blocks replace Trainer's; None without DeepSpeed.
        own: key -> origin of the values that the user gave.

    Returns:
        Notes for the header on values with an unexpected effect.

    Raises:
        UserError: a part cannot be built; names the flag.
    """
    notes: list[str] = []
    engine = engine or {}
    stage = int(engine.get("zero_optimization", {}).get("stage", 0))
    # DeepSpeed checks its own blocks when the engine starts (zero/blocks.py try_engine)
    if "optimizer" not in engine:
        notes += _check_optimizer(args, stage, own)
    if "scheduler" not in engine:
        notes += _check_schedule(args, steps)
    _check_trackers(args.report_to)
    _check_helpers(args)
    return notes


# ---- optimizer ----


def _check_optimizer(args: TrainConfig, stage: int, own: dict[str, str]) -> list[str]:
    name = _value(args.optim)
    if args.optim_target_modules:
        args = copy.copy(args)
        # the user's names can be checked only against the model's own layers
        args.optim_target_modules = "all-linear"
    assignments = [part.strip() for part in args.optim_args.split(",")] if args.optim_args else []
    malformed = next((part for part in assignments if part.count("=") != 1), None)
    if malformed is not None:
        raise UserError(
            "DSR384", f"--optim_args {args.optim_args}: {malformed!r} is not NAME=VALUE; separate several with commas"
        )
    with _refusing(f"--optim {name}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")):
        optimizer = _updated(args, [_WHOLE])[0]
    for key in (part.partition("=")[0].strip() for part in assignments):
        if not _is_read(args, key):
            raise UserError("DSR384", f"--optim_args {args.optim_args}: {name} does not read {key!r}")
    if stage and isinstance(optimizer, torch.optim.Adagrad):
        raise UserError(
            "DSR385",
            f"--optim {name} under ZeRO-{stage}: DeepSpeed rebuilds torch's Adagrad without its groups and its schedule; "
            "give another --optim, or --deepspeed zero0 or none",
        )
    adam_keys = [key for key in ("adam_beta1", "adam_beta2", "adam_epsilon") if key in own]
    notes = [
        coded("DSR386", f"{key} has no effect: optim is {name} ({own[key]})")
        for key in adam_keys
        if not _has_effect(args, key)
    ]
    if stage and not _is_torchs(optimizer) and not _is_elementwise(args):
        note = (
            f"optim {name} updates matrices or blocks, not single numbers, and ZeRO-{stage} gives it flat shards: memory and "
            "results depend on stage and ranks; --deepspeed zero0 or none keeps the matrices whole"
        )
        notes.append(coded("DSR387", note))
    return notes


def _updated(args: TrainConfig, shapes: list[tuple[int, ...]]) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """The optimizer of parameters of these shapes after two steps, and all their values as one flat tensor."""
    model = nn.Module()
    if shapes == [_WHOLE]:
        model.layer = nn.Linear(_SIDE, _SIDE, bias=False, device=args.device)
    else:
        model.parts = nn.ParameterList(torch.empty(shape, device=args.device) for shape in shapes)
    values = torch.linspace(-1, 1, _SIDE * _SIDE, device=args.device)
    parameters = list(model.parameters())
    torch.nn.utils.vector_to_parameters(values.clone(), parameters)
    optimizer = _Parts(args, model).create_optimizer()
    set_mode = getattr(optimizer, "train", None)
    if callable(set_mode):
        set_mode()  # schedule-free optimizers demand it
    # torch's own need no trial; LOMO and the layerwise ones update in the backward pass
    if not _is_torchs(optimizer) and not _value(args.optim).endswith(("lomo", "layerwise")):
        # two steps, since an error may need a state of the first; of different sizes, so that states matter
        for scale in (1.0, 0.1):
            gradients = iter((values.flip(0) * scale + 0.01).split([p.numel() for p in parameters]))
            for parameter in parameters:
                parameter.grad = next(gradients).view_as(parameter).clone()
            optimizer.step()
    return optimizer, torch.nn.utils.parameters_to_vector(parameters).detach()


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's own; those that Trainer offers all update each number by itself."""
    return type(optimizer).__module__.startswith("torch.optim")


def _is_elementwise(args: TrainConfig) -> bool:
    """Whether a number's update depends on its own gradients alone, so that it is the same in any shard."""
    half = _SIDE * _SIDE // 2
    whole, parts = _updated(args, [_WHOLE])[1], _updated(args, [(half,), (half,)])[1]
    return torch.allclose(whole, parts, rtol=1e-5, atol=args.learning_rate * 1e-3)


def _settings(args: TrainConfig, **changes: Any) -> Any:
    """The optimizer's arguments with a change, or what goes wrong with it."""
    changed = copy.copy(args)
    for key, value in changes.items():
        setattr(changed, key, value)
    try:
        # only the model's named parameters are read here
        layer: Any = nn.Linear(1, 1)
        settings = Trainer.get_optimizer_cls_and_kwargs(changed, layer)[1]
        return {key: value for key, value in settings.items() if key != "params"}
    except Exception as error:
        return type(error)


def _is_read(args: TrainConfig, key: str) -> bool:
    """Whether the optimizer reads a key of --optim_args: then a nonsensical value makes a difference."""
    return _settings(args, optim_args=f"{key}=nonsense") != _settings(args, optim_args=None)


def _has_effect(args: TrainConfig, key: str) -> bool:
    """Whether the optimizer's arguments change with a field of TrainConfig."""
    return _settings(args, **{key: getattr(args, key) / 2}) != _settings(args)


def _value(choice: Any) -> str:
    """The name of an enumeration's member; transformers types such fields as text too."""
    return str(getattr(choice, "value", choice))


# ---- schedule ----


def _check_schedule(args: TrainConfig, steps: int) -> list[str]:
    kind = _value(args.lr_scheduler_type)
    given: Any = args.lr_scheduler_kwargs or {}
    options = f" --lr_scheduler_kwargs {given}" if given else ""
    if "last_epoch" in given:
        raise UserError(
            "DSR388", "--lr_scheduler_kwargs: leave out last_epoch; --resume_from_checkpoint sets where a schedule resumes"
        )
    # SGD, so that a fault of the optimizer is not reported as one of the schedule
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    warmup = args.get_warmup_steps(steps)
    with _refusing(f"--lr_scheduler_type {kind}{options}, {steps} steps, {warmup} of them warm-up"):
        scheduler = _Parts(args, nn.Module()).create_scheduler(steps, optimizer)
        for factor in getattr(scheduler, "lr_lambdas", ()):
            # the ends and the middle of warm-up and decay, where a division by a length of 0 shows
            for step in sorted({0, 1, warmup, (warmup + steps) // 2, steps - 1, steps}):
                if not math.isfinite(factor(step)):
                    raise ValueError(f"the learning rate of step {step} is not finite")
    decay = given.get("num_decay_steps", 0)
    stable = given.get("num_stable_steps") or 0
    if kind == "warmup_stable_decay" and steps < warmup + stable + decay:
        note = (
            f"{kind}: {warmup} steps of warm-up, {stable} stable and {decay} of decay are more than the run's {steps}, so the "
            "learning rate does not decay to its end"
        )
        return [coded("DSR389", note)]
    if warmup >= steps and hasattr(scheduler, "lr_lambdas") and kind != "constant":
        rate = f"{args.learning_rate:g}"
        note = f"the warm-up takes {warmup} steps and the run {steps}, so the learning rate never reaches {rate}"
        return [coded("DSR389", note)]
    return []


# ---- trackers, loader, compiler ----


def _check_trackers(names: list[str]) -> None:
    if not names:
        return
    # imports pandas, which few runs need
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise UserError(
                "DSR390",
                f"--report_to {name}: unknown tracker{nearest(name, known)}; choose from {', '.join(known)}, all, none",
            )
        # without its package, a callback that has a __del__ would print a traceback when it is deleted
        if hasattr(known[name], "__del__") and not getattr(integration_utils, f"is_{name}_available")():
            packages = "dagshub mlflow" if name == "dagshub" else name
            raise UserError("DSR391", f"--report_to {name}: its package is not installed. Run `pip install {packages}`")
        with _refusing(f"--report_to {name}"):
            known[name]()


def _check_helpers(args: TrainConfig) -> None:
    """The data loader, activation checkpointing and the compiler."""
    with _refusing("--dataloader_*"):
        rows: Any = [0]
        # its constructor checks the combination, and starts no worker yet
        DataLoader(
            rows,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
    if args.activation_checkpointing:
        with _refusing(f"--activation_checkpointing_kwargs {args.activation_checkpointing_kwargs}"):
            given: Any = args.activation_checkpointing_kwargs or {}
            # as the model's own activation checkpointing calls it
            options = {"use_reentrant": False} | given
            checkpoint(nn.Identity(), torch.ones(1, requires_grad=True), **options).backward()
    if args.torch_compile:
        backend, mode = str(args.torch_compile_backend), args.torch_compile_mode
        with _refusing(f"--torch_compile true (backend {backend}, mode {mode or 'default'})"):
            torch.compile(torch.square, backend=backend, mode=mode)(torch.ones(2, device=args.device))
