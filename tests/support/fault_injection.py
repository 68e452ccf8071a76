"""Faults that a run's audit must find: each makes one thing wrong in a run that is about to train.

A fault is a context manager whose value changes the run once it has started.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from dsrecipes.data.sampler import StepSampler
from dsrecipes.train.state import Run

Change = Callable[[Run], None]
Fault = contextlib.AbstractContextManager[Change]


class _Begin(TrainerCallback):
    """Does something once the engine stands."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act()


def nothing() -> Fault:
    """No fault."""
    return contextlib.nullcontext(lambda run: None)


def detached() -> Fault:
    """A trained parameter that the loss does not depend on."""

    def change(run: Run) -> None:
        trainer = run.trainer
        norm = next(each for name, each in trainer.model.named_modules() if name.endswith(("ln_f", "norm")))
        norm.register_forward_hook(lambda module, given, result: result.detach() + given[0] - given[0].detach())

    return contextlib.nullcontext(change)


def sick_gradient() -> Fault:
    """A backward pass that gives one parameter a NaN, on rank 1 alone; the loss stays finite."""

    def change(run: Run) -> None:
        trainer = run.trainer
        name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad and p.dim() == 1)
        if trainer.args.process_index == trainer.args.world_size - 1:
            act = lambda: parameter.register_hook(lambda gradient: gradient * float("nan"))  # noqa: E731
            trainer.callback_handler.callbacks.insert(0, _Begin(act))

    return contextlib.nullcontext(change)


def same_rows() -> Fault:
    """A sampler that gives every rank the rows of rank 0."""

    def change(run: Run) -> None:
        trainer = run.trainer
        make = trainer.get_train_dataloader

        def loader(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            made.batch_sampler.rank = 0
            return made

        trainer.get_train_dataloader = loader  # type: ignore[method-assign]

    return contextlib.nullcontext(change)


def other_steps() -> Fault:
    """A sampler whose epoch is longer on the last rank."""

    class Longer(StepSampler):
        def __len__(self) -> int:
            return super().__len__() + 2 * self.rank

    def change(run: Run) -> None:
        trainer = run.trainer
        make = trainer.get_train_dataloader

        def loader(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            made.batch_sampler.__class__ = Longer
            return made

        trainer.get_train_dataloader = loader  # type: ignore[method-assign]

    return contextlib.nullcontext(change)


def _collated(change: Callable[[dict[str, Any], int], None]) -> Callable[[], Fault]:
    def spoil() -> Fault:
        def wrap(run: Run) -> None:
            trainer = run.trainer
            collate, calls = trainer.data_collator, [0]

            def changed(items: list) -> dict[str, Any]:
                batch = collate(items)
                calls[0] += 1
                change(batch, calls[0])
                return batch

            trainer.data_collator = changed

        return contextlib.nullcontext(wrap)

    return spoil


def _mask_first_line(batch: dict[str, Any], call: int) -> None:
    if "logits_to_keep" in batch:
        line = torch.arange(len(batch["logits_to_keep"]))[:, None].expand_as(batch["logits_to_keep"])
        first = line[batch["logits_to_keep"]] == 0
        batch["shift_labels"][first] = -100
    else:
        batch["labels"][0] = -100


def _one_long_example(batch: dict[str, Any], call: int) -> None:
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]).contiguous()


def _mask_all_later(batch: dict[str, Any], call: int) -> None:
    if call > 6:
        batch["shift_labels"].fill_(-100)


unlabelled = _collated(_mask_first_line)
"""A collator that masks the first sequence of every micro batch."""
leaking = _collated(_one_long_example)
"""A collator whose positions do not restart."""
masked_later = _collated(_mask_all_later)
"""A collator that masks everything after its sixth micro batch."""


def not_divided() -> Fault:
    """An engine of a lower stage than the run believes to have."""

    def change(run: Run) -> None:
        trainer = run.trainer

        def act() -> None:
            run.prepared.setup.zero.json["zero_optimization"]["stage"] = 3  # type: ignore[union-attr]

        trainer.add_callback(_Begin(act))

    return contextlib.nullcontext(change)


def frozen_adapter() -> Fault:
    """An adapter whose lora_A is 0, so that lora_B gets a gradient of 0."""

    def change(run: Run) -> None:
        trainer = run.trainer
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:
                nn.init.zeros_(parameter)

    return contextlib.nullcontext(change)


@contextlib.contextmanager
def little_memory() -> Iterator[Change]:
    """A limit of this process's memory, 32 MB above what it has when training begins, none of it free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ballast: list[bytearray] = []

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0])

    def change(run: Run) -> None:
        trainer = run.trainer

        def act() -> None:
            for size in (16 << 20, 1 << 20, 1 << 16):  # earlier runs in this process left free memory to it
                before = pages()
                while pages() == before:
                    ballast.append(bytearray(size))
            resource.setrlimit(resource.RLIMIT_AS, (pages() * resource.getpagesize() + (32 << 20), hard))

        trainer.add_callback(_Begin(act))

    try:
        yield change
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        ballast.clear()


def lost_loss() -> Fault:
    """A model whose loss is exactly 0 from the third step on, as communication that overlaps has caused."""

    def change(run: Run) -> None:
        trainer = run.trainer

        def drop(module: nn.Module, given: Any, result: Any) -> Any:
            result["loss"] = result["loss"] * float(trainer.state.global_step < 2)
            return result

        trainer.model.register_forward_hook(drop)

    return contextlib.nullcontext(change)
