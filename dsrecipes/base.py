"""RecipeBase: what does a row mean, and which hooks may a recipe replace? Training (train/training.py) executes it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.config.layers import Layers
from dsrecipes.config.parse import build_config
from dsrecipes.config.schema import Config
from dsrecipes.config.sources import Source
from dsrecipes.data.load import load_splits
from dsrecipes.data.renamed import renamed
from dsrecipes.data.row import Row
from dsrecipes.errors import UserError
from dsrecipes.io.console import Console

if TYPE_CHECKING:
    import torch
    from transformers import (
        EvalPrediction,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
    )

    from dsrecipes.data.encode import Segments
    from dsrecipes.data.sources import MixedSplit, SourceRows
    from dsrecipes.data.split import Split

Metrics = Callable[["EvalPrediction"], dict[str, Any]]
"""All logits and labels of a split, in row order -> figures by name."""

# imported by name when a recipe is run: commands that only read a recipe must not import the training
_TRAINING = "dsrecipes.train.training"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, the last step and the figures of metrics.json."""

    path: Path
    step: int
    metrics: dict[str, Any]


class RecipeBase(ABC):
    """A recipe: what a row means. Everything else about a run is the same for all recipes, and is in train/.

    Row hooks (format_row, encode, finish) are static, because their arguments are then all that can change tokens: the key of
    the token cache covers exactly these. The other hooks receive what a run has made so far as arguments, so that none
    depends on when it is called.
    """

    auto_class = "AutoModelForCausalLM"
    """The transformers class that loads the model."""
    cut_into_blocks = False
    """True joins all rows to one stream of tokens and cuts it into blocks of max_length."""

    @staticmethod
    @abstractmethod
    def format_row(row: Row) -> dict:
        """Turn a row into a record of plain Python; raise ValueError for a row that has no meaning."""

    @staticmethod
    @abstractmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Turn records into columns: input_ids and labels (-100: not trained on), one entry a record.

        Optional keys: weights, the weight of each label, or an empty list where all are 1; record, the index of each entry's
        record, where a record becomes several entries or none; notes, a list of lines for the header for each record.
        """

    @staticmethod
    def prompt(record: dict, options: EncodeOptions) -> Segments | dict | None:
        """Write what precedes a record's answer, for rows and typed texts that have none (chat, generate, judge).

        Args:
            record: as format_row gives it, perhaps with another answer in place of the missing one; or, where format_row
                refuses a row without an answer, the row. Read fields with record[name]: where a text is typed, the record is
                empty at first, and the KeyError names the field that the text fills.
            options: what the rows were encoded with.

        Returns:
            Segments as encode_segments takes them, the last one True if the model continues it; or a chat, {"messages", perhaps
            "tools"}, for the tokenizer's template. None, the default: only rows with an answer have prompts.
        """
        return None

    # ---- hooks with a default ----

    def load_rows(self) -> dict[str, Iterable[Row]]:
        """Load rows by split: train, and validation and test where they exist; called once for each source of a mixture."""
        data = self.config.data
        splits = load_splits(data.dataset, data.dataset_config)
        if data.eval_dataset:
            held_out = load_splits(data.eval_dataset, data.dataset_config)
            # a file without splits counts as train
            name = next(name for name in ("validation", "train", "test") if name in held_out)
            splits["validation"] = held_out[name]
        return renamed(splits, data.columns)

    def of_source(self, source: Source) -> RecipeBase:
        """Copy this recipe with the settings of one source, for its load_rows."""
        # a shallow copy: hooks that add notes add them to the list of the run
        recipe = copy.copy(self)
        recipe.config = replace(self.config, data=self.config.data.of_source(source))
        return recipe

    def load_source(self, source: Source) -> dict[str, Iterable[Row]]:
        """Load the rows of one source with its own settings."""
        return (self.of_source(source) if self.config.data.is_mixture else self).load_rows()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer."""
        from dsrecipes.model.tokenizer import load_tokenizer

        return load_tokenizer(self.config.model)

    @staticmethod
    def finish(paths: dict[str, Path], held_out: bool, options: EncodeOptions) -> dict[str, str]:
        """Rewrite prepared files once all rows are known, such as class names as numbers; the default leaves them as they are.

        Args:
            paths: an Arrow file by split.
            held_out: whether the validation rows are a part of the training rows.
            options: what the rows were encoded with.

        Returns:
            The new fingerprint (data.columns.ColumnWriter's) of each split that was rewritten.
        """
        return {}

    def configure(self, model_config: PretrainedConfig, splits: dict[str, Split | MixedSplit]) -> None:
        """Adapt the model's configuration to the prepared rows before the model exists: a class for each label.

        Raises:
            UserError: a label is negative.
        """
        if not self.auto_class.endswith("ForSequenceClassification"):
            return
        classes = {label for split in splits.values() for label in split.data["labels"][:]}
        # a negative label would index from the end of the logits, or be ignored as -100 is
        if min(classes) < 0:
            raise UserError("DSR622", f"classifier labels must start at 0, but the rows have {min(classes)}")
        # never fewer than the model has: its head may know classes that these rows lack
        model_config.num_labels = max(model_config.num_labels, max(classes) + 1)

    def load_model(self, model_config: PretrainedConfig, dtype: torch.dtype, deepspeed: bool) -> PreTrainedModel:
        """Load the model with its weights, ready to train.

        Args:
            model_config: as `configure` left it.
            dtype: of the weights.
            deepspeed: whether DeepSpeed will hold the weights, and fp32 copies of those it trains.
        """
        # here, as in the other hooks: importing a recipe must not import torch
        from dsrecipes.model.load import load_model

        return load_model(self.config.model, model_config, self.auto_class, dtype, self.config.train["seed"], deepspeed)

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list], dict[str, torch.Tensor]]:
        """Make the function that turns rows into tensors."""
        from dsrecipes.data.collate import CausalCollator, PaddingCollator
        from dsrecipes.model.attention import accepts_segments
        from dsrecipes.model.task import is_causal_lm, pad_id

        if not self.auto_class.endswith("ForCausalLM"):
            return PaddingCollator(pad_id(tokenizer))
        return CausalCollator(pad_id(tokenizer), is_causal_lm(model), accepts_segments(model))

    def metrics(
        self, split: Split | MixedSplit, train: Split | MixedSplit, model_config: PretrainedConfig
    ) -> Metrics | None:
        """Make the function that computes figures of a split in addition to its loss.

        For recipes with one label a row: the evaluation of a causal model keeps no logits, and reports its perplexity.

        Args:
            split: the rows that are evaluated.
            train: the training rows, for baselines such as the most common class.
            model_config: as `configure` left it.
        """
        return None

    def callbacks(self) -> list[TrainerCallback]:
        """Make Trainer callbacks of the recipe's own; called once on each rank, when the trainer exists."""
        return []

    def write_extras(self, folder: Path, sources: Sequence[SourceRows]) -> None:
        """Write files of the recipe's own into the run folder; called on rank 0 when training has ended.

        Args:
            folder: the run folder.
            sources: the rows by data set and split, as `load_rows` gave them.
        """

    # ---- not hooks ----

    def __init__(self, layers: Layers, console: Console | None = None, config: Config | None = None) -> None:
        """Check the configuration; nothing is loaded yet.

        Args:
            layers: the values that YAML files, flags and keywords gave.
            console: where the run reports; one that has introduced the run already.
            config: of a finished run, which was read from the layers without what only training needs.
        """
        self.config: Config = config or build_config(layers)
        self.notes: list[str] = []
        """Lines that a hook adds to the run's header."""
        self.introduced = console is not None
        self.console = console or Console()
        if config is None:
            self.console.bars = not self.config.train["disable_tqdm"]
        if self.config.data.class_weights and not self.auto_class.endswith("ForSequenceClassification"):
            raise UserError("DSR623", self._no_class_weights())

    def _no_class_weights(self) -> str:
        what = "tokens"
        if self.auto_class.endswith("ForMultipleChoice"):
            what = "options, whose order means nothing"
        return (
            f"--class_weights: {self.config.layers.recipe.name} has no classes, but {what}: drop the flag; a field `weight` "
            "weights rows"
        )

    def build_trainer(self) -> Trainer:
        """Prepare rows and model, and return the trainer, untrained."""
        return import_module(_TRAINING).Training(self).build_trainer()

    def run(self) -> RunResult:
        """Train, save the model, evaluate, and leave one run folder that holds everything.

        Raises:
            UserError: whatever the user can fix.
            RunStopped: a signal or --time_limit ended the run; it is saved and can resume.
        """
        return import_module(_TRAINING).Training(self).run()
