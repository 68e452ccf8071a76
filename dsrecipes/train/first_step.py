"""Does the first step train what it should: a gradient for each parameter, a label for each row, own rows and shards a rank?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsrecipes.data.audit import OFF, RankRows, check_ranks, unlabelled
from dsrecipes.errors import UserError, plural
from dsrecipes.train.loaders import sequences_of_step
from dsrecipes.train.state import Run
from dsrecipes.zero.internals import local_shard
from dsrecipes.zero.shards import Shards, check_shards, gradient_bytes, measure_shards

# the router may send no token of a step to some expert, whose parameters then rightly have no gradient
_EXPERT = re.compile(r"(^|\.)experts\.")
"""Names of parameters of experts."""
_SHOWN = 3
"""Parameters that a message names."""


@dataclass(frozen=True)
class _Audit:
    """What one rank found in its first step."""

    gradients: dict[str, float]
    """Sum of the absolute gradient by parameter."""
    nonfinite_weight: str | None
    losses: list[float]
    rows: RankRows
    unlabelled: list[int]
    """Rows without a label after the collator."""
    shards: Shards


class FirstStep(TrainerCallback):
    """Audits the first step of this process; a fault on any rank ends all ranks with the same UserError.

    Gradients are examined as they arise and sizes just before the update, because neither exists afterwards.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.trainer = run, run.trainer
        self.engine: Any = None
        self.done = False
        self.hooks: list[Any] = []
        self.gradients: dict[str, torch.Tensor] = {}
        """Sum of the absolute gradient by parameter: 0 where all of it is 0, not finite where a part is not."""
        self.gradient_bytes = (0, 4)
        self.nonfinite_weight: str | None = None
        """A weight that was not finite before the first update."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Observe each gradient, and the moment before the update."""
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad:
                self.hooks.append(parameter.register_hook(lambda gradient, name=name: self._add(name, gradient)))
        if self.run.prepared.setup.zero is None:
            return
        self.engine = self.trainer.deepspeed
        # with DeepSpeed, Trainer calls no callback between backward and update: both happen inside the engine
        update = self.engine.step

        def look_and_step(*args: Any, **kwargs: Any) -> Any:
            # this wrapper is never removed, because others may have wrapped it in turn
            if not self.done:
                self._before_update()
            return update(*args, **kwargs)

        self.engine.step = look_and_step

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        # a sum of absolute values, because it is 0 or not finite exactly where the gradient is
        size = torch.linalg.vector_norm(gradient.detach(), 1, dtype=torch.float32)
        self.gradients[name] = self.gradients[name] + size if name in self.gradients else size

    def _before_update(self) -> None:
        self.gradient_bytes = gradient_bytes(self.trainer.model, self._optimizer())
        sizes = list(self.gradients.values())
        # reading all weights takes time, and only then is there a reason to
        if sizes and not torch.stack(sizes).isfinite().all():
            self.nonfinite_weight = nonfinite_weight(self.trainer.model)

    def _optimizer(self) -> Any:
        return self.engine.optimizer if self.engine is not None else self.trainer.optimizer.optimizer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at gradients and weights before the update, with plain PyTorch."""
        if self.engine is None and not self.done:
            self._before_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Exchange the findings of all ranks, refuse faults, and report what each rank holds."""
        if self.done:
            return
        # it stays in the list of callbacks, because Trainer is iterating over that
        self.done = True
        for hook in self.hooks:
            hook.remove()
        audits: list[_Audit] = self.run.signals.all_gather(self._audit(state.global_step))
        setup = self.run.prepared.setup
        # causes before effects: weights that hold NaN would also be reported as gradients that do
        check_ranks([audit.rows for audit in audits])
        self._refuse_unlabelled([audit.unlabelled for audit in audits])
        check_weights([audit.nonfinite_weight for audit in audits])
        losses = torch.tensor([loss for audit in audits for loss in audit.losses])
        # a loss that is not finite gets a message of its own; a step whose rows all have weight 0 has no gradient
        if self.trainer.step_loss.weight != 0 and losses.isfinite().all():
            trained = [name for name, parameter in self.trainer.model.named_parameters() if parameter.requires_grad]
            check_gradients(trained, [audit.gradients for audit in audits], setup.precision == "fp16")
        stage = setup.zero.stage if setup.zero else None
        offloads = bool(setup.zero and setup.zero.offloads_optimizer)
        line = check_shards(stage, [audit.shards for audit in audits], offloads)
        self.run.prepared.console.say(f"{'holds':<10}{line}")

    def _audit(self, step: int) -> _Audit:
        trainer = self.trainer
        sizes = torch.stack(list(self.gradients.values())).tolist() if self.gradients else []
        sequences = sequences_of_step(trainer, step)
        loader: Any = trainer.callback_handler.train_dataloader
        missing: list[int] = []
        for batch, indices in zip(trainer.batches, sequences, strict=False):
            missing += unlabelled(batch, [trainer.train_dataset.rows(index) for index in indices])
        return _Audit(
            gradients=dict(zip(self.gradients, sizes, strict=True)),
            nonfinite_weight=self.nonfinite_weight,
            losses=[loss.item() for loss in trainer.losses],
            rows=RankRows(len(loader), sum(sequences, [])),
            unlabelled=missing,
            shards=measure_shards(trainer.model, self._optimizer(), self.gradient_bytes),
        )

    def _refuse_unlabelled(self, rows_by_rank: list[list[int]]) -> None:
        for rank, rows in enumerate(rows_by_rank):
            if rows:
                raise UserError(
                    "DSR378",
                    f"{plural(len(rows), 'row')} of rank {rank}'s first step without a label after the collator "
                    f"({self.run.prepared.describe_rows(rows)}), so nothing is learned from them: fix the recipe's collator. "
                    f"{OFF}",
                )


def nonfinite_weight(model: torch.nn.Module) -> str | None:
    """Find the first parameter, or this rank's part of one, that holds a NaN or infinite number."""
    for name, parameter in model.named_parameters():
        values = local_shard(parameter).detach()
        if values.is_floating_point() and values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            return name
    return None


def check_weights(nonfinite: list[str | None]) -> None:
    """Refuse weights that hold NaN before the first update (UserError)."""
    name = next(filter(None, nonfinite), None)
    if name is not None:
        raise UserError(
            "DSR379",
            f"the weights that the run started from hold NaN or infinite numbers (first in {name}), so the first gradients do "
            "too: take another copy of --model_name_or_path, or of the checkpoint. Nothing was saved",
        )


def check_gradients(trained: list[str], gradients: list[dict[str, float]], scaled: bool) -> None:
    """Refuse trained parameters without a gradient, or with one that is not finite.

    LoRA's lora_A has a gradient of 0 at first, since lora_B is 0; lora_B has one of 0 only where nothing reaches it.

    Args:
        trained: names of the parameters that are to be trained.
        gradients: of each rank, the sum of the absolute gradient by name.
        scaled: whether the loss is scaled (fp16), where the first gradients may overflow.

    Raises:
        UserError: names them.
    """
    count = f"{len(trained):,} trained parameters"
    missing = [name for name in trained if not any(name in sizes for sizes in gradients) and not _EXPERT.search(name)]
    if missing:
        raise UserError(
            "DSR380",
            f"{_names(missing)} of {count} got no gradient in the first step: the loss does not depend on them. Freeze them, "
            f"or fix the model; for LoRA see --lora_target_modules. {OFF}",
        )
    for rank, sizes in enumerate(gradients):
        nonfinite = [name for name, size in sizes.items() if not torch.tensor(size).isfinite()]
        if nonfinite and not scaled:
            raise UserError(
                "DSR381",
                f"{_names(nonfinite)} of {count} got a gradient with NaN or infinite numbers in the first step on rank "
                f"{rank}, although the loss is finite: try --attn_implementation eager, or another precision",
            )
    adapters = [name for name in trained if "lora_B" in name]
    unreached = [name for name in adapters if all(sizes.get(name) == 0 for sizes in gradients)]
    # a single one may be: a layer whose attention looks at one token has no gradient
    if unreached and len(unreached) == len(adapters):
        raise UserError(
            "DSR382",
            f"{_names(unreached)} of {count} got a gradient of 0 in the first step, so this adapter learns nothing: see "
            f"--lora_target_modules. {OFF}",
        )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
