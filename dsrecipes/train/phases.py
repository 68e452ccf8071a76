"""Which callbacks tell the watchdog what a rank is doing?"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsrecipes.launch.watchdog import Watchdog


class PhaseReporter(TrainerCallback):
    """Reports the optimizer's step to the watchdog; DeepSpeed takes it at the end of the backward pass."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watchdog.enter("optimizer step")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watchdog.enter("between steps")
