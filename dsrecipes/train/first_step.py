"""The first step's audit: every trained parameter gets a gradient, every row a label, every rank its own rows and shards."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import TrainerCallback

from dsrecipes.data.audit import OFF, RankRows, check_ranks, unlabelled
from dsrecipes.errors import UserError, plural
from dsrecipes.train.state import Run
from dsrecipes.zero.internals import local_shard
from dsrecipes.zero.shards import check_shards, gradient_bytes, measure_shards

_EXPERT = re.compile(r"(^|\.)experts\.")
"""Parameters of a mixture's expert, which a step without tokens for it leaves alone."""
_SHOWN = 3


class FirstStep(TrainerCallback):
    """Watches the first step of this process on every rank; what one finds ends all with the same UserError."""

    def __init__(self, run: Run) -> None:
        self.run, self.trainer = run, run.trainer
        self.engine, self.done = None, False
        self.hooks: list[Any] = []
        self.sizes: dict[str, torch.Tensor] = {}
        """Sum of the absolute gradient by parameter: 0 where all of it is 0, not finite where a part is not."""
        self.gradients = (0, 4)
        self.sick: str | None = None
        """A weight that was not finite before the first update."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at each gradient as it comes, and at what is held just before the update, which gradients do not outlive."""
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad:
                self.hooks.append(parameter.register_hook(lambda gradient, name=name: self._see(name, gradient)))
        self.engine = self.trainer.deepspeed if self.run.prepared.setup.zero else None
        if self.engine is not None:
            update = self.engine.step

            def look_and_step(*given: Any, **named: Any) -> Any:
                if not self.done:  # it stays in place, for others may have put themselves before it
                    self._before_update()
                return update(*given, **named)

            self.engine.step = look_and_step

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        size = torch.linalg.vector_norm(gradient.detach(), 1, dtype=torch.float32)
        self.sizes[name] = self.sizes[name] + size if name in self.sizes else size

    def _before_update(self) -> None:
        self.gradients = gradient_bytes(self.trainer.model, self._optimizer())
        if self._not_finite():
            self.sick = sick_weight(self.trainer.model)

    def _optimizer(self) -> Any:
        return self.engine.optimizer if self.engine is not None else self.trainer.optimizer.optimizer

    def _not_finite(self) -> list[str]:
        if not self.sizes:
            return []
        finite = torch.stack(list(self.sizes.values())).isfinite().tolist()
        return [name for name, each in zip(self.sizes, finite, strict=True) if not each]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plain PyTorch's moment between backward and the update."""
        if self.engine is None and not self.done:
            self._before_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring the ranks' findings together, say what each holds, and be gone."""
        if self.done:
            return
        self.done = True  # and stays in the list of callbacks, which is being walked through
        for hook in self.hooks:
            hook.remove()
        trainer, setup = self.trainer, self.run.prepared.setup
        mine = {
            "sizes": dict(zip(self.sizes, torch.stack(list(self.sizes.values())).tolist(), strict=True))
            if self.sizes
            else {},
            "sick": self.sick,
            "losses": [loss.item() for loss in trainer.losses],
            "rows": RankRows(
                len(trainer.callback_handler.train_dataloader), sum(trainer.sequences_of_step(state.global_step), [])
            ),
            "unlabelled": self._unlabelled(state.global_step),
            "shards": measure_shards(trainer.model, self._optimizer(), self.gradients),
        }
        found = self.run.signals.all_gather(mine)
        check_ranks([each["rows"] for each in found])
        self._refuse_unlabelled([each["unlabelled"] for each in found])
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        check_weights([each["sick"] for each in found])
        # else the loss is reported; a step whose rows all weigh 0 has no gradient
        if trainer.step_weight != 0 and all(torch.tensor(each["losses"]).isfinite().all() for each in found):
            check_gradients(trained, [each["sizes"] for each in found], setup.precision == "fp16")
        zero = setup.zero
        line = check_shards(
            zero.stage if zero else None, [each["shards"] for each in found], bool(zero and zero.offloads_optimizer)
        )
        self.run.prepared.console.say(f"{'holds':<10}{line}")

    def _unlabelled(self, step: int) -> list[int]:
        data, missing = self.trainer.train_dataset, []
        for batch, sequences in zip(self.trainer.batches, self.trainer.sequences_of_step(step), strict=False):
            missing += unlabelled(batch, [data.rows(index) for index in sequences])
        return missing

    def _refuse_unlabelled(self, found: list[list[int]]) -> None:
        for rank, rows in enumerate(found):
            if rows:
                raise UserError(
                    f"{plural(len(rows), 'row')} of rank {rank}'s first step without a "
                    f"label after the collator ({self.run.prepared.describe_rows(rows)}), so nothing is learned from them: mend the "
                    f"recipe's collator. {OFF}"
                )


def sick_weight(model: torch.nn.Module) -> str | None:
    """The first parameter, or this rank's part of one, that holds a NaN or infinite number."""
    for name, parameter in model.named_parameters():
        values = local_shard(parameter).detach()
        if values.is_floating_point() and values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            return name
    return None


def check_weights(sick: list[str | None]) -> None:
    """Refuse weights that hold NaN before the first update (UserError)."""
    name = next(filter(None, sick), None)
    if name is not None:
        raise UserError(
            f"the weights that the run started from hold NaN or infinite numbers (first in {name}), so the first gradients do "
            "too: take another copy of --model_name_or_path, or of the checkpoint. Nothing was saved"
        )


def check_gradients(trained: list[str], found: list[dict[str, float]], scaled: bool) -> None:
    """Refuse trained parameters without a gradient, or with one that is not finite.

    LoRA's lora_A has a gradient of 0 at first, since lora_B is 0; a lora_B of 0 gets none only where nothing reaches it.

    Args:
        trained: names of the parameters that are to be trained.
        found: of each rank, the sum of the absolute gradient by name.
        scaled: whether the loss is scaled (fp16), where the first gradients may overflow.

    Raises:
        UserError: names them.
    """
    missing = [name for name in trained if not any(name in each for each in found) and not _EXPERT.search(name)]
    if missing:
        raise UserError(
            f"{_these(missing)} of {len(trained):,} trained parameters got no gradient in the first step: the loss does not "
            f"depend on them. Freeze them, or mend the model; for LoRA see --lora_target_modules. {OFF}"
        )
    for rank, sizes in enumerate(found):
        bad = [name for name, size in sizes.items() if not torch.tensor(size).isfinite()]
        if bad and not scaled:
            raise UserError(
                f"{_these(bad)} of {len(trained):,} trained parameters got a gradient with NaN or infinite numbers in the first "
                f"step on rank {rank}, although the loss is finite: try --attn_implementation eager, or another precision"
            )
    adapters = [name for name in trained if "lora_B" in name]
    still = [name for name in adapters if all(each.get(name) == 0 for each in found)]
    if still and len(still) == len(adapters):  # one alone may: a layer whose attention looks at one token has no gradient
        raise UserError(
            f"{_these(still)} of {len(trained):,} trained parameters got a gradient of 0 in the first step, so this adapter "
            f"learns nothing: see --lora_target_modules. {OFF}"
        )


def _these(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
