"""What do all ranks agree on at the end of a step: was it sound, and does the run now evaluate, save or stop?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import IntervalStrategy, Trainer

from dsrecipes.train.saving import CheckpointWriter


class StepEnd:
    """Sets Trainer's control flags by what all ranks agree on."""

    def __init__(self, trainer: Trainer, writer: CheckpointWriter) -> None:
        """Set up; the first step's end is the first decision."""
        self.trainer, self.writer, self.signals = trainer, writer, writer.context.signals
        self.check: Callable[[], Any] = self.signals.sync
        """Agrees with the other ranks on the result of a step; a collective call."""
        self.gradient_norm: torch.Tensor | float | None = None
        """Of the last step, where the engine gives one."""
        self._ended_step = -1

    def decide(self, grad_norm: torch.Tensor | float | None) -> None:
        """Decide whether to evaluate and save now; a collective call.

        Trainer calls this at each step's end, and once more at the end of an epoch. With --eval_strategy epoch the second
        call evaluates, after the save of the epoch's last step, which must remember that. An evaluation that is due when the
        run stops is left to the resumed run, so that stopping is quick.
        """
        trainer, control, state = self.trainer, self.trainer.control, self.trainer.state
        if self._ended_step != state.global_step:
            self._ended_step = state.global_step
            self.gradient_norm = grad_norm
            self.signals.step_ended()
            # before anything is saved: a step with NaN must reach no checkpoint
            self.check()
            epoch = float(state.epoch or 0)
            # Trainer ends the last epoch at max_steps, also inside the data
            epoch_ends = epoch.is_integer() or state.global_step >= state.max_steps
            is_due = trainer.args.eval_delay <= epoch
            by_epoch = trainer.args.eval_strategy == IntervalStrategy.EPOCH
            self.writer.owes_evaluation = epoch_ends and is_due and by_epoch
            control.should_save |= self.signals.saving or self.writer.owes_save
            self.signals.saving = False
        elif control.should_evaluate:
            self.writer.owes_evaluation = False
        if self.signals.leaving:
            if control.should_evaluate:
                control.should_evaluate, self.writer.owes_evaluation = False, True
            # also with --save_strategy no, so that the run can resume
            control.should_save = True
