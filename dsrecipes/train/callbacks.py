"""What happens when the engine has started, and at the last step: checks, the header, ds_config.json, the end of a dry run."""

from __future__ import annotations

import shutil
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsrecipes.data.audit import check_ends, packed_sample
from dsrecipes.model.attention import isolate_examples
from dsrecipes.train import artifacts
from dsrecipes.train.header import first_example, header
from dsrecipes.train.state import Run
from dsrecipes.zero.internals import report_gradient_norm


class DryRunEnded(Exception):
    """Raised before the first step of a dry run."""


class StartAndEnd(TrainerCallback):
    """Checks and shows what has started, before the first step; logs the last step, whatever --logging_steps is."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check engine, rows and attention, print the header, and end a dry run here."""
        prepared, trainer = self.run.prepared, self.run.trainer
        engine = trainer.deepspeed if prepared.setup.zero else None
        if engine is not None:
            prepared.setup.check_engine(engine)
            report_gradient_norm(engine)
        prepared.console.say(header(prepared, trainer))
        if prepared.config.train["audit"] and trainer.causal and not prepared.recipe.cut_into_blocks:
            check_ends(trainer.train_dataset.sample, prepared.tokenizer, trainer.model)
        self._keep_examples_apart(args)
        if prepared.config.train["dry_run"]:
            prepared.console.say(first_example(trainer, prepared.tokenizer))
            # a dry run has a temporary folder on each rank
            shutil.rmtree(self.run.folder.path)
            raise DryRunEnded
        if engine is not None and prepared.console.main:
            artifacts.write_ds_config(self.run.folder, trainer)

    def _keep_examples_apart(self, args: TrainingArguments) -> None:
        """Check on a packed sample that attention stays inside each example; choose an implementation that does."""
        prepared, trainer = self.run.prepared, self.run.trainer
        stream = prepared.rows.stream
        largest_batch = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
        sample = packed_sample(
            trainer.train_dataset.sample,
            largest_batch,
            later=stream is not None and stream.capacity is not None,
            collate=trainer.data_collator,
            forward=trainer.evaluator.loss_and_logits,
            exact=prepared.setup.precision == "fp32",
        )
        if sample is not None:
            choose = prepared.config.model.attn_implementation is None
            isolate_examples(trainer.model, sample, args.device, choose=choose)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step, which is the run's result; with a stream, state which epoch the step is in."""
        if self.run.prepared.rows.stream:
            # Trainer cannot know: a stream has no length
            state.epoch = self.run.prepared.rows.stream.epoch(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True
