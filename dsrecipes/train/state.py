"""What does a run know at each stage? Prepared: before the ranks connect; Run: once there is a trainer.

Both are frozen, so that a helper cannot depend on the order in which fields are set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dsrecipes.base import RecipeBase, RunResult
from dsrecipes.config.schema import Config
from dsrecipes.config.train_config import TrainConfig
from dsrecipes.data.provenance import RowSources
from dsrecipes.data.sequences import Sequences
from dsrecipes.data.sources import MixedSplit, SourceRows
from dsrecipes.data.split import Split
from dsrecipes.data.stream import Stream
from dsrecipes.io.console import Console
from dsrecipes.launch.signals import StopSignals
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.runs.folder import RunFolder
from dsrecipes.train.environment import RunEnvironment
from dsrecipes.train.saving import step_of
from dsrecipes.train.setup import RunSetup
from dsrecipes.train.trainer import RecipeTrainer

__all__ = ["Prepared", "Rows", "Run", "RunResult"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run, prepared."""

    sources: list[SourceRows]
    """As the recipe loaded them."""
    splits: dict[str, Split | MixedSplit]
    """Tokens by split; without train where the training rows are streamed."""
    stream: Stream | None
    """The training rows of a run with --streaming."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that is decided before the process group starts."""

    recipe: type[RecipeBase]
    """For its constants and row hooks."""
    config: Config
    setup: RunSetup
    console: Console
    engine: dict[str, Any] | None
    """The resolved ZeRO JSON; None with plain PyTorch."""
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    sequences: dict[str, Sequences]
    """What the loaders read, by split."""
    packs: bool
    """Whether several examples share a sequence."""
    named_folder: Path | None
    """The run folder, where the user named one."""
    candidates: list[Path]
    """Checkpoints that the run may resume from, best first."""

    @property
    def train_data(self) -> Sequences | Stream:
        """The training sequences."""
        return self.rows.stream if self.rows.stream is not None else self.sequences["train"]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        train = self.config.train
        if train["max_steps"] > 0:
            return train["max_steps"]
        return math.ceil(train["num_train_epochs"] * math.ceil(len(self.sequences["train"]) / self.setup.batch))

    def describe_rows(self, rows: list[int]) -> str:
        """Name training rows by the files and lines that they came from."""
        if self.rows.stream is not None:
            return self.rows.stream.places(rows)
        # a block is no row of a file: it is described by the texts that it was cut from
        block = self.config.data.max_length if self.recipe.cut_into_blocks else None
        files = self.sequences["train"].by_file(rows)
        return "; ".join(RowSources(path).describe(numbers, block) for path, numbers in files)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to train, or trains, or has trained."""

    prepared: Prepared
    args: TrainConfig
    folder: RunFolder
    checkpoint: Path | None
    """What the run resumes from."""
    signals: StopSignals
    watchdog: Watchdog
    trainer: RecipeTrainer
    environment: RunEnvironment
    """Here so that the folder stays locked as long as anything refers to the run, also where nobody leaves the environment."""

    @property
    def model(self) -> PreTrainedModel:
        """The model as the recipe loaded it, without the engine around it."""
        return self.trainer.model

    @property
    def start(self) -> tuple[int, bool]:
        """The step that the run starts after, and whether that step's evaluation is still due."""
        return step_of(self.checkpoint) if self.checkpoint else (0, False)
