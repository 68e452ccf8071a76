"""Where do the figures of a step go? log.jsonl, TensorBoard and the progress bar, on rank 0."""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import rewrite_logs

from dsrecipes.errors import coded
from dsrecipes.io.console import Console
from dsrecipes.runs.figures import FIGURES
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.log import truncate_log

_BAR = "{desc} {n_fmt}/{total_fmt} |{bar:6}| {elapsed}<{remaining}{postfix}"
"""A short bar, so that all figures fit on a line of 110 columns."""


class Recorder(TrainerCallback):
    """Rank 0's log.jsonl, TensorBoard curves and progress bar."""

    def __init__(self, folder: RunFolder, console: Console, step: int, evaluates: bool) -> None:
        """Forget what was logged after the step that the run resumes from.

        Args:
            folder: of the run.
            console: shows the bar.
            step: that the run resumes after; 0 for a new one.
            evaluates: whether the evaluation of that step comes again.
        """
        # before anything is logged: a killed run may have logged steps that come again now
        truncate_log(folder.log, step, evaluates)
        self.log, self.console = folder.log, console
        self.unwritten: list[str] = []
        """Lines that could not be written; each further line tries again."""
        self.board: SummaryWriter | None = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)
        self.bar: Any = None
        self.shown: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar, at the step that a resumed run starts after."""
        self.bar = self.console.progress("step", total=state.max_steps, initial=state.global_step, bar_format=_BAR)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Write one line; non-finite numbers become text, which JSON has no number for."""
        # the summary at Trainer's end repeats the figures, over a time that includes evaluations
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "epoch": state.epoch, "time": time.time()} | logs
        line = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self._write(json.dumps(line) + "\n")
        self._draw(rewrite_logs(logs), state.global_step)
        formats = {key: figure.bar for key, figure in FIGURES.items() if figure.bar}
        self.shown |= {key: value for key, value in logs.items() if key in formats and value is not None}
        if self.bar is not None:
            self.bar.set_postfix_str(
                " ".join(text.format(self.shown[key]) for key, text in formats.items() if key in self.shown)
            )

    def _write(self, line: str) -> None:
        """Append to log.jsonl; a full or missing disk does not end the training."""
        self.unwritten.append(line)
        try:
            # the file may have been removed in the meantime, with its folder
            size = self.log.stat().st_size if self.log.exists() else 0
            try:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write("".join(self.unwritten))
            except OSError:
                # a full disk may have taken a part of a line, which the next attempt would write again
                os.truncate(self.log, size)
                raise
        except OSError as error:
            # one warning for all lines that wait
            if len(self.unwritten) == 1:
                text = f"{self.log} cannot be written ({error.strerror}); training continues"
                self.console.say(coded("DSR392", f"warning   {text}"))
        else:
            self.unwritten.clear()

    def _draw(self, figures: dict[str, Any], step: int) -> None:
        """Add points to TensorBoard's curves; if it cannot write, they end, and log.jsonl has the figures."""
        if self.board is None:
            return
        try:
            for key, value in figures.items():
                if isinstance(value, (int, float)) and not key.endswith("/epoch"):
                    self.board.add_scalar(key, value, step)
            # at once, so that a killed run has its curves, and a write error is raised here and not in a thread
            self.board.flush()
        except OSError as error:
            text = f"TensorBoard cannot write ({error.strerror}): its curves end at step {step}"
            self.console.say(coded("DSR392", f"warning   {text}"))
            self.board = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()
        self.bar = None
