"""Which rows does a run train and evaluate on, and how are they grouped into sequences?"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dsrecipes.base import RecipeBase
from dsrecipes.config.schema import Config
from dsrecipes.data.mixture import JoinedSequences, Mixture, rows_by_epoch
from dsrecipes.data.row import Row
from dsrecipes.data.sequences import Sequences
from dsrecipes.data.sources import (
    MixedSplit,
    SourceRows,
    by_split,
    named,
    prepare_source,
    require_split,
    source_rows,
    style_notes,
)
from dsrecipes.data.split import Split
from dsrecipes.data.stream import Stream
from dsrecipes.data.streamable import stream_files
from dsrecipes.data.weights import class_weights
from dsrecipes.errors import UserError, plural
from dsrecipes.launch.signals import StopSignals
from dsrecipes.model.checks import check_splits
from dsrecipes.model.tokenizer import check_ids, embedding_rows
from dsrecipes.train.saving import read_progress
from dsrecipes.train.setup import RunSetup
from dsrecipes.train.state import Prepared, Rows


def unused_settings(recipe: RecipeBase) -> list[str]:
    """Note data settings that the user gave and that a bundled recipe of this kind does not read."""
    if not type(recipe).__module__.startswith("dsrecipes.recipes."):
        # a user's own recipe may read any of them
        return []
    is_read = {
        **dict.fromkeys(("prompt_style", "reasoning", "packing"), _has_prompts(recipe)),
        **dict.fromkeys(("subjects", "split"), recipe.auto_class.endswith("ForMultipleChoice")),
        "problem_type": recipe.auto_class.endswith("ForSequenceClassification"),
    }
    data, origins = recipe.config.data, dict(recipe.config.own)
    origins |= {key: f"of {source.name}" for source in (*data.sources, *data.eval_sources) for key in source.own}
    return [
        f"{key} has no effect: the recipe {recipe.config.layers.recipe.name} does not use it ({origin})"
        for key, origin in origins.items()
        if not is_read.get(key, True)
    ]


def _has_prompts(recipe: RecipeBase) -> bool:
    return recipe.auto_class.endswith("ForCausalLM") and not recipe.cut_into_blocks


def prepare_rows(
    recipe: RecipeBase, setup: RunSetup, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
) -> Rows:
    """Tokenize each source by itself, so that adding one to a mixture changes nothing about the others.

    Lines for the header are appended to `setup.notes`.

    Raises:
        UserError: a row at fault, missing rows, or a token that the model does not have.
    """
    config, data = recipe.config, recipe.config.data
    sources = source_rows(data, recipe.load_source)
    # now, so that notes of loading stand above those of later stages
    take_notes(recipe, setup)
    if _has_prompts(recipe):
        setup.notes += style_notes(data)
    origin = config.own.get("validation_split")
    if origin and data.validation_split and not any(source.held_out for source in sources):
        setup.notes.append(f"validation_split has no effect: the data have validation rows ({origin})")
    prepared: list[tuple] = []
    stream = None
    for source in sources:
        with named(source.source) if data.is_mixture else nullcontext():
            if not data.is_mixture:
                require_split(source.source, "train", source.splits)
            options = source.data
            if options.streaming:
                stream = _stream(recipe, setup, source.splits.pop("train"), tokenizer, model_config)
            splits = _prepare_source(recipe, source, sources[0], tokenizer) if source.splits else {}
            block = options.max_length if recipe.cut_into_blocks else None
            # before any weights are loaded: a token without a row in the embedding would fail in the first forward pass
            check_splits(splits, tokenizer, embedding_rows(model_config), block)
        prepared.append((source.source, splits))
    by_name: dict[str, Split | MixedSplit] = dict(by_split(prepared) if data.is_mixture else prepared[0][1])
    return Rows(sources=sources, splits=by_name, stream=stream)


def take_notes(recipe: RecipeBase, setup: RunSetup) -> None:
    """Move the lines that a hook has just added into the header, where they follow those of earlier stages."""
    setup.notes += recipe.notes
    recipe.notes.clear()


def _prepare_source(
    recipe: RecipeBase, source: SourceRows, first: SourceRows, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Split]:
    """Prepare one source; where training rows decide the numbers of labels, validation rows are prepared with some."""
    seed = recipe.config.train["seed"]
    if "train" in source.splits or not _rewrites(recipe):
        return prepare_source(type(recipe), source, tokenizer, seed, recipe.console)
    # the training rows decide which number a label has; of this source, only the other splits are used
    source = replace(source, splits={"train": first.splits["train"]} | source.splits)
    splits = prepare_source(type(recipe), source, tokenizer, seed, recipe.console)
    return {name: split for name, split in splits.items() if name != "train"}


def _rewrites(recipe: RecipeBase) -> bool:
    """Whether the recipe rewrites all prepared rows once it knows them."""
    return type(recipe).finish is not RecipeBase.finish


def data_seed(config: Config) -> int:
    """The seed that orders rows."""
    train = config.train
    return train["seed"] if train["data_seed"] is None else train["data_seed"]


def _stream(
    recipe: RecipeBase,
    setup: RunSetup,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
) -> Stream:
    """Make a stream of the training rows; only the files' sizes and samples are read yet."""
    config, data, train = recipe.config, recipe.config.data, recipe.config.train
    if _rewrites(recipe):
        raise UserError(
            "DSR350", "--streaming true: this recipe rewrites all prepared rows (finish); give --streaming false"
        )
    stream = Stream(
        stream_files(rows, str(data.dataset)),
        type(recipe),
        tokenizer,
        data.encoding,
        per_step=setup.batch,
        steps=train["max_steps"],
        seed=data_seed(config),
        shuffle=train["train_sampling_strategy"] == "random",
        packing=data.packing,
        skip_bad_rows=data.skip_bad_rows,
        check_ids=partial(check_ids, tokenizer=tokenizer, rows=embedding_rows(model_config)),
    )
    setup.notes += stream.notes()
    return stream


# ---- sequences ----


def packs(recipe: RecipeBase) -> bool:
    """Whether several examples share a sequence."""
    return bool(recipe.config.data.packing) and _has_prompts(recipe)


def make_sequences(recipe: RecipeBase, setup: RunSetup, rows: Rows, model_config: PretrainedConfig) -> dict[str, Sequences]:
    """Group the rows of each split into what the loaders read."""
    capacity = recipe.config.data.max_length if packs(recipe) else None
    weights = _class_weights(recipe.config, rows, model_config)
    return {name: _sequences_of(name, split, capacity, weights, recipe.config, setup) for name, split in rows.splits.items()}


def _class_weights(config: Config, rows: Rows, model_config: PretrainedConfig) -> np.ndarray | None:
    """Weights of the classes in label order; None where none are requested."""
    requested = config.data.class_weights
    if not requested:
        return None
    id2label: Any = model_config.id2label
    names = [str(id2label[index]) for index in range(len(id2label))]
    return class_weights(requested, np.asarray(rows.splits["train"].data["labels"][:]), names)


def _sequences_of(
    name: str,
    split: Split | MixedSplit,
    capacity: int | None,
    weights: np.ndarray | None,
    config: Config,
    setup: RunSetup,
) -> Sequences:
    """Group a split into sequences; training rows of several sources are drawn where shares were requested."""
    if isinstance(split, Split):
        return Sequences(split.path, capacity, weights)
    train = config.train
    if name == "train":
        # a row, or a block where texts are cut into them, is a sequence here: shares count rows, and packing follows
        parts = {source: Sequences(part.path, None, weights) for source, part in split.parts.items()}
        counts = rows_by_epoch(config.data.sources, {source: len(part) for source, part in parts.items()})
        if counts is not None:
            mixture = Mixture(parts, counts, capacity, data_seed(config))
            mixture.fix_length(setup.batch, train["num_train_epochs"], train["max_steps"])
            return mixture
    return JoinedSequences({source: Sequences(part.path, capacity, weights) for source, part in split.parts.items()})


# ---- the first rows ----


def read_first_rows(prepared: Prepared, signals: StopSignals, checkpoint: Path | None, changed: list[str]) -> None:
    """Read a stream's first window, or the one that the checkpoint is in; note what is odd about rows. A collective call.

    Raises:
        UserError: a row at fault, or files that differ between the ranks or from the checkpoint's.
    """
    stream = prepared.rows.stream
    if stream is None:
        stats = prepared.rows.splits["train"].stats
    else:
        # each rank reads the files by itself, and takes its rows by position
        if len(set(signals.all_gather(stream.fingerprint))) > 1:
            dataset = prepared.config.data.dataset
            raise UserError("DSR365", f"--dataset {dataset}: the ranks see different files, so they would skip rows")
        if "data" in changed:
            raise UserError("DSR366", "--allow_changed data: a stream resumes by position, which other data do not have")
        stream.begin(read_progress(checkpoint)["stream"] if checkpoint else None)
        stats = stream.window.end.read
    prepared.setup.notes += [f"{note} ({plural(rows, 'row')})" for note, rows in stats.notes.items()]
