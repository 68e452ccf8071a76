"""RecipeBase: the whole story of a run, top to bottom."""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from dsrecipes.config.checks import best_metric
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.config.find import RecipeFiles, is_shipped
from dsrecipes.config.flags import JUDGED_SCHEDULES, without_effect
from dsrecipes.config.layers import Layers, layer
from dsrecipes.config.parse import build_config
from dsrecipes.config.schema import Config
from dsrecipes.config.sources import Source
from dsrecipes.config.train_config import TrainConfig
from dsrecipes.config.values import seconds_of
from dsrecipes.data.audit import check_ends, packed_sample, stop_at_ends
from dsrecipes.data.collate import CausalCollator, PaddingCollator
from dsrecipes.data.encode import Segments
from dsrecipes.data.files import Row
from dsrecipes.data.load import load_splits
from dsrecipes.data.mixture import JoinedSequences, Mixture, rows_by_epoch
from dsrecipes.data.provenance import RowSources
from dsrecipes.data.renamed import renamed
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
from dsrecipes.data.streamable import check_streaming, stream_files
from dsrecipes.data.weights import class_weights
from dsrecipes.errors import UserError, inflect, nearest, plural
from dsrecipes.io.caches import check_docstrings, redirect_caches
from dsrecipes.io.console import Console
from dsrecipes.io.disk import is_disk_full, is_write_error, put_in_place, sync
from dsrecipes.io.paths import cache_root
from dsrecipes.launch.environment import DEVICE_KEYS, RANK_KEYS
from dsrecipes.launch.signals import StopSignals
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.model.attention import accepts_segments, isolate_examples
from dsrecipes.model.cached_models import random_weights
from dsrecipes.model.checks import check_attention, check_model, check_splits
from dsrecipes.model.configuration import load_config
from dsrecipes.model.load import load_model
from dsrecipes.model.memory import is_out_of_memory
from dsrecipes.model.modalities import unreached_note
from dsrecipes.model.quantization import disable_cpu_packing
from dsrecipes.model.task import is_causal_lm, pad_id
from dsrecipes.model.tokenizer import check_ids, check_vocabulary, embedding_rows, load_tokenizer
from dsrecipes.runs.checkpoint_integrity import find_damage, first_intact
from dsrecipes.runs.curve import draw_curve
from dsrecipes.runs.reference import save_reference
from dsrecipes.train import artifacts, summary
from dsrecipes.train.diagnosis import check_step, load_of, out_of_memory
from dsrecipes.train.first_step import FirstStep
from dsrecipes.train.identity import check_identity, run_identity
from dsrecipes.train.precheck import check_parts
from dsrecipes.train.recorder import Recorder
from dsrecipes.train.run_folder import choose_folder, delete_replaced, leave_folder, take_folder
from dsrecipes.train.saving import CheckpointContext, read_progress, step_of
from dsrecipes.train.setup import RunSetup, resolve_setup
from dsrecipes.train.trainer import RecipeTrainer
from dsrecipes.train.training import verify_apart
from dsrecipes.zero.blocks import keep_fixed_steps, try_engine
from dsrecipes.zero.internals import report_gradient_norm
from dsrecipes.zero.process import check_started
from dsrecipes.zero.rank_group import rank_group


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, the step reached and the figures of metrics.json."""

    path: Path
    step: int
    metrics: dict[str, Any]


class RecipeBase(ABC):
    """A recipe: what a row means. The rest of a run is here and the same for all.

    The row hooks are static, for what they are given is all that may change tokens: it is the cache key.
    """

    auto_class = "AutoModelForCausalLM"
    """The transformers class that loads the model."""
    cut_into_blocks = False
    """True joins all rows to one stream of tokens and cuts it into blocks of max_length."""

    @staticmethod
    @abstractmethod
    def format_row(row: Row) -> dict:
        """A row as a record of plain Python; ValueError says what is wrong with it."""

    @staticmethod
    @abstractmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Records as columns: input_ids and labels (-100: not trained on), one entry a record.

        Other keys that may be there: weights, the weight of each label, or an empty list where all are 1; record, the
        index of each entry's record where a record becomes several entries or none; notes, a list of lines for the header
        for each record.
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

    # ---- may be replaced ----

    def load_rows(self) -> dict[str, Iterable[Row]]:
        """Rows by split: train, and validation and test where there are some; of several sources called for each."""
        data = self.config.data
        splits = load_splits(data.dataset, data.dataset_config)
        if data.eval_dataset:
            held = load_splits(data.eval_dataset, data.dataset_config)
            splits["validation"] = held.get("validation", held.get("train", held.get("test")))
        return renamed(splits, data.columns)

    def of_source(self, source: Source) -> RecipeBase:
        """This recipe with the settings of one source, for its load_rows."""
        story = copy.copy(self)
        story.config = replace(self.config, data=self.config.data.of_source(source))
        return story

    def load_source(self, source: Source) -> dict[str, Iterable[Row]]:
        """Load the rows of one source with its own settings."""
        return (self.of_source(source) if self.config.data.is_mixture else self).load_rows()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.config.model)

    def load_model(self) -> PreTrainedModel:
        """The model with weights, ready to train."""
        return load_model(
            self.config.model, self.model_config, self.auto_class, self.place.dtype(self.config.model),
            self.config.train["seed"], self.place.zero is not None,
        )  # fmt: skip

    @staticmethod
    def finish(paths: dict[str, Path], held_out: bool, options: EncodeOptions) -> dict[str, str]:
        """Rewrite prepared files once all rows are known, such as names of classes as numbers; by default not at all.

        Args:
            paths: an Arrow file by split.
            held_out: whether the validation rows are a part of the training rows.
            options: what the rows were encoded with.

        Returns:
            The new fingerprint (data.columns.ColumnWriter's) of each split that was rewritten.
        """
        return {}

    def configure(self) -> None:
        """Fit self.model_config to the prepared rows, before there is a model: a classifier gets as many classes as labels."""
        if not self.auto_class.endswith("ForSequenceClassification"):
            return
        classes = {label for split in self.splits.values() for label in split.data["labels"][:]}
        if min(classes) < 0:
            raise UserError(f"labels of a classifier count from 0, found {min(classes)}")
        self.model_config.num_labels = max(self.model_config.num_labels, max(classes) + 1)

    def collator(self) -> Callable[[list], dict[str, torch.Tensor]]:
        """Rows to tensors."""
        if not self.auto_class.endswith("ForCausalLM"):
            return PaddingCollator(pad_id(self.tokenizer))
        return CausalCollator(pad_id(self.tokenizer), is_causal_lm(self.model), accepts_segments(self.model))

    def metrics(self, split: Split) -> Metrics | None:
        """Figures beside the loss for a split: a function of all logits and labels, in row order.

        For recipes with one label a row; a causal recipe's evaluation keeps no logits, and reports its perplexity.
        """
        return None

    def write_extras(self, folder: Path) -> None:
        """Files of the recipe's own in the run folder; called on rank 0 when training ends."""

    # ---- never replaced: the story ----

    def __init__(self, layers: Layers, console: Console | None = None) -> None:
        """Check the configuration; nothing is loaded yet."""
        self.config: Config = build_config(layers)
        if self.config.data.class_weights and not self.auto_class.endswith("ForSequenceClassification"):
            raise UserError(
                f"--class_weights: {self.config.layers.recipe.name} has no classes, but "
                f"{'options, whose order means nothing' if self.auto_class.endswith('ForMultipleChoice') else 'tokens'}: drop "
                "the flag; a field `weight` weighs rows"
            )
        self.console = console or Console()
        self._introduced = console is not None
        self.console.bars = not self.config.train["disable_tqdm"]

    def build_trainer(self) -> RecipeTrainer:
        """Everything up to a Trainer: data before the process group, the process group before the model."""
        train, data = self.config.train, self.config.data
        check_docstrings()
        cache_note = redirect_caches()  # for use from Python; dsrecipes.run has already done it
        self.place: RunSetup = resolve_setup(self.config)
        values = {**vars(self.config.model), **vars(data), **train}
        self.place.notes += without_effect(values, self.config.own, self.place.zero is not None)
        self.place.notes += self._unused_settings()
        if data.streaming:
            self.place.notes += check_streaming(self.config, self.auto_class)
        self.console.main = self.place.ranks.rank == 0
        if not self._introduced:
            self.console.say(self.config.layers.first_line())
        if cache_note:
            self.console.say(f"{'cache':<10}{cache_note}")
        if not train["verbose"]:
            disable_progress_bar()  # transformers' own: of reading and writing shards
        named, candidates = choose_folder(self.config, self.place, self.console.say)
        self.console.say(summary.loading(self.config.model))
        self.model_config: PretrainedConfig = load_config(self.config.model, self.auto_class)
        stage = self.place.zero.stage if self.place.zero else None
        check_model(self.model_config, self.config.model, data.max_length, stage)
        engine = self.place.resolve_zero(self.config, self.model_config)
        self.tokenizer = self.load_tokenizer()
        padding = check_vocabulary(self.tokenizer, self.model_config)
        self.place.notes += [*self.config.notes, *([padding] if padding else [])]
        check_attention(self.config.model, self.model_config, self.auto_class)
        if self.config.model.lora_target_modules:
            from dsrecipes.model.lora_targets import check_targets

            check_targets(self.config.model, self.model_config, self.auto_class)
        self.stream: Stream | None = None
        self.splits = self._prepare()
        self.configure()
        self._set_padding()
        packs = data.packing and self.auto_class.endswith("ForCausalLM") and not self.cut_into_blocks
        self.class_weights = self._class_weights()
        self.sequences = {
            name: self._sequences(name, split, data.max_length if packs else None) for name, split in self.splits.items()
        }
        train_data = self.stream or self.sequences["train"]
        if self.config.model.from_scratch:
            random_weights(self.model_config, self.auto_class, train["seed"])
        self.args = self._start(engine)
        self.place.notes += check_parts(self.args, self.steps(), engine, self.config.own)
        if engine is not None and not is_shipped(self.place.zero.path) and not self.place.zero.uses_nvme:
            try_engine(engine, self.place.zero.path)
        self._check_best_metric()
        if train["neftune_noise_alpha"] and packs:
            self.place.notes.append(
                "NEFTune scales its noise by the length of a whole packed sequence; with --packing false, of a row"
            )
        limit = seconds_of(train["time_limit"]) if train["time_limit"] else None
        self.orders = StopSignals(limit, rank_group(self.args.ddp_timeout_delta))
        self.folder, self._lock, self._made_folder = take_folder(
            named, candidates, self.config, self.orders, self.console.main
        )
        self.args.output_dir = str(self.folder.path)
        candidates = self.orders.all_gather(candidates)[0]
        self.checkpoint = first_intact(candidates, self._damage, self.console.say) if candidates else None
        terms = run_identity(self)
        changed = check_identity(self.checkpoint, terms, train["allow_changed"]) if self.checkpoint else []
        if self.stream:
            self._begin_stream(self.stream, changed)
        read = self.stream.window.end.read if self.stream else self.splits["train"].stats
        self.place.notes += [f"{note} ({plural(rows, 'row')})" for note, rows in read.notes.items()]
        self._open_folder()
        self.watch = self._watch()
        self.model = self.load_model()
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError(f"model {self.config.model.model_name_or_path}: it has no parameter that can be trained")
        if is_causal_lm(self.model) and not self.cut_into_blocks:
            self.place.notes += stop_at_ends(train_data.sample, self.tokenizer, self.model)
        disable_cpu_packing(self.model)  # a recipe's own load_model may not have done it
        trainer = RecipeTrainer(
            model=self.model, args=self.args, data_collator=self.collator(), train_dataset=train_data,
            eval_dataset=self.sequences.get("validation"),
            processing_class=self.tokenizer, watch=self.watch, weighted=any(each.weighted for each in (train_data, *self.sequences.values())),
            keeping=CheckpointContext(self.folder, self.place.made_by(), terms, self.orders, self.console.say, changed),
            compute_metrics=self.metrics(self.splits["validation"]) if "validation" in self.splits else None,
        )  # fmt: skip
        self.trainer = trainer
        router, unreached = trainer.router, unreached_note(self.model)
        self.place.notes += [*([router.note()] if router else []), *([unreached] if unreached else [])]
        trainer.at_step_end = partial(check_step, self, trainer)
        trainer.remove_callback(PrinterCallback)
        if train["early_stopping_patience"]:
            trainer.add_callback(EarlyStoppingCallback(train["early_stopping_patience"]))
        if train["audit"]:
            trainer.add_callback(FirstStep(self, trainer))
        trainer.add_callback(_FirstAndLastStep(self, trainer))
        if self.console.main and not train["dry_run"]:
            trainer.add_callback(Recorder(self.folder, self.console, *self._resumes_at()))
        return trainer

    def run(self) -> RunResult:
        """Train, save the model, evaluate, and leave one run folder that holds everything.

        Raises:
            UserError: whatever the user can mend.
            RunStopped: a signal or --time_limit ended it; it is saved and can go on.
        """
        began = time.monotonic()
        before = {key: os.environ.get(key) for key in (*RANK_KEYS, *DEVICE_KEYS)}
        try:
            try:
                trainer = self.build_trainer()
            except UserError:
                if hasattr(self, "folder") and (self.console.main or self.config.train["dry_run"]):
                    leave_folder(self.folder, self._made_folder)  # the corrected command needs no other --output_dir
                raise
            if self.console.main:
                delete_replaced(self.folder)
            try:
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            except _DryRunEnds:
                return RunResult(self.folder.path, trainer.state.global_step, {})
            return self._finish(trainer, began)
        except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
            if hasattr(self, "watch"):
                self.watch.exit_if_peer_left(error)
            if isinstance(error, OSError) and str(error.filename).startswith(str(cache_root())):
                raise UserError(
                    f"the cache {cache_root()} cannot be used: {error.strerror} ({error.filename}). Set DSRECIPES_CACHE "
                    "to another folder"
                ) from error
            if is_out_of_memory(error) and hasattr(self, "place"):
                raise UserError(out_of_memory(load_of(self), self.place.ranks.rank, error, self._stood_at())) from error
            if hasattr(self, "folder") and is_disk_full(error, self.folder.path):
                raise UserError(
                    f"--output_dir {self.folder.path}: no space left on the disk to save into. Free some, and give the same "
                    "command with --resume_from_checkpoint auto; --save_total_limit 1 needs less"
                ) from error
            raise
        finally:
            if hasattr(self, "watch"):
                self.watch.end(failed=sys.exception() is not None)
            if getattr(self, "stream", None):
                self.stream.close()
            if getattr(self, "_lock", None):
                self._lock.release()
            # transformers finds ZeRO-3 through a global, accelerate leaves a variable behind and so do we: a later run,
            # or a process started from a notebook, must not meet this one's
            unset_hf_deepspeed_config()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
            for key, value in before.items():
                os.environ.pop(key, None) if value is None else os.environ.update({key: value})

    # ---- the story's steps ----

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint's bytes; each rank looks at a part of them, and all know."""
        part = find_damage(checkpoint, self.place.ranks.rank, self.place.ranks.world)
        return next((each for each in self.orders.all_gather(part) if each), None)

    @property
    def _has_prompts(self) -> bool:
        return self.auto_class.endswith("ForCausalLM") and not self.cut_into_blocks

    def _unused_settings(self) -> list[str]:
        """Notes on data settings that the user gave and that a bundled recipe of this kind does not read."""
        if not type(self).__module__.startswith("dsrecipes.recipes."):
            return []  # a recipe of one's own may read any of them
        kinds = {
            **dict.fromkeys(("prompt_style", "reasoning", "packing"), self._has_prompts),
            **dict.fromkeys(("subjects", "split"), self.auto_class.endswith("ForMultipleChoice")),
            "problem_type": self.auto_class.endswith("ForSequenceClassification"),
        }
        data, given = self.config.data, dict(self.config.own)
        given |= {key: f"of {source.name}" for source in (*data.sources, *data.eval_sources) for key in source.own}
        return [
            f"{key} has no effect: the recipe {self.config.layers.recipe.name} does not use it ({origin})"
            for key, origin in given.items()
            if not kinds.get(key, True)
        ]

    def _set_padding(self) -> None:
        """Have a decoder's classifier find each row's last token: it looks for the last one that is not this padding."""
        if self.auto_class.endswith("ForSequenceClassification"):
            self.model_config.get_text_config().pad_token_id = pad_id(self.tokenizer)

    def _class_weights(self) -> np.ndarray | None:
        """Weights of the classes in label order; None where none are asked for."""
        asked = self.config.data.class_weights
        if not asked:
            return None
        names = [str(self.model_config.id2label[index]) for index in range(self.model_config.num_labels)]
        return class_weights(asked, np.asarray(self.splits["train"].data["labels"][:]), names)

    def _prepare(self) -> dict[str, Split | MixedSplit]:
        """Prepare each source by itself, so that another one in the list changes nothing of it."""
        self.by_source = source_rows(self.config.data, self.load_source)
        if self._has_prompts:
            self.place.notes += style_notes(self.config.data)
        origin = self.config.own.get("validation_split")
        if origin and self.config.data.validation_split and not any(part.held_out for part in self.by_source):
            self.place.notes.append(f"validation_split has no effect: the data have validation rows ({origin})")
        prepared, mixed = [], self.config.data.is_mixture
        for part in self.by_source:
            with named(part.source) if mixed else nullcontext():
                if not mixed:
                    require_split(part.source, "train", part.splits)
                options = part.data
                if options.streaming:
                    self.stream = self._stream(part.splits.pop("train"))
                splits = self._prepare_source(part) if part.splits else {}
                block = options.max_length if self.cut_into_blocks else None
                check_splits(splits, self.tokenizer, embedding_rows(self.model_config), block)
            prepared.append((part.source, splits))
        return by_split(prepared) if mixed else prepared[0][1]

    def _prepare_source(self, part: SourceRows) -> dict[str, Split]:
        """Prepare one source; a recipe that numbers its labels over the training rows sees some beside validation rows."""
        seed = self.config.train["seed"]
        if "train" in part.splits or type(self).finish is RecipeBase.finish:
            return prepare_source(type(self), part, self.tokenizer, seed, self.console)
        part = replace(part, splits={"train": self.by_source[0].splits["train"]} | part.splits)
        splits = prepare_source(type(self), part, self.tokenizer, seed, self.console)
        return {name: split for name, split in splits.items() if name != "train"}

    def _sequences(self, name: str, split: Split | MixedSplit, capacity: int | None) -> Sequences:
        """A split's sequences; training rows of several sources are drawn where shares were asked for."""
        if isinstance(split, Split):
            return Sequences(split.path, capacity, self.class_weights)
        data, train = self.config.data, self.config.train
        counts = None
        if name == "train":
            # blocks, where texts are cut into them, else rows
            parts = {source: Sequences(part.path, None, self.class_weights) for source, part in split.parts.items()}
            counts = rows_by_epoch(data.sources, {source: len(part) for source, part in parts.items()})
        if counts is None:
            return JoinedSequences(
                {source: Sequences(part.path, capacity, self.class_weights) for source, part in split.parts.items()}
            )
        seed = train["seed"] if train["data_seed"] is None else train["data_seed"]
        mixture = Mixture(parts, counts, capacity, seed)
        mixture.fix_length(self.place.batch, train["num_train_epochs"], train["max_steps"])
        return mixture

    def _start(self, engine: dict[str, Any] | None) -> TrainConfig:
        """Build TrainConfig, which creates the process group, and see that what was asked for is what started."""
        values = dict(self.config.train)
        if "validation" not in self.splits:
            self._refuse_options_that_need_evaluations()
            values["eval_strategy"] = "no"
        values |= {
            "output_dir": tempfile.gettempdir(), "deepspeed": engine, "use_cpu": self.place.device == "cpu",
            "bf16": self.place.precision == "bf16", "fp16": self.place.precision == "fp16",
            "per_device_train_batch_size": self.place.micro, "gradient_accumulation_steps": self.place.accumulation,
            "resume_from_checkpoint": None, "disable_tqdm": True, "remove_unused_columns": False,
            "restore_callback_states_from_checkpoint": True,
        }  # fmt: skip
        values |= best_metric(values)
        try:
            args = TrainConfig(**values)
        except ValueError as error:
            raise UserError(str(error)) from error
        args.report_to = [name for name in args.report_to if name != "tensorboard"]  # RUN/tensorboard has the curves
        if engine is not None:
            keep_fixed_steps(args.hf_deepspeed_config, engine)
        check_started(self.place.zero.stage if self.place.zero else None, self.place.ranks, args)
        return args

    def _refuse_options_that_need_evaluations(self) -> None:
        train = self.config.train
        options = {
            "load_best_model_at_end": train["load_best_model_at_end"],
            "early_stopping_patience": train["early_stopping_patience"],
            "save_strategy best": train["save_strategy"] == "best",
            f"lr_scheduler_type {train['lr_scheduler_type']}": train["lr_scheduler_type"] in JUDGED_SCHEDULES,
        }
        for flag, is_set in options.items():
            if is_set:
                raise UserError(f"--{flag}: there are no validation rows; give --eval_dataset or --validation_split")

    def steps(self) -> int:
        """Optimizer steps of the run."""
        train = self.config.train
        if train["max_steps"] > 0:
            return train["max_steps"]
        return math.ceil(train["num_train_epochs"] * math.ceil(len(self.sequences["train"]) / self.place.batch))

    def _stream(self, rows: Iterable[Row]) -> Stream:
        """The training rows as a stream; nothing but the files' sizes and samples is read yet."""
        train, data = self.config.train, self.config.data
        if type(self).finish is not RecipeBase.finish:
            raise UserError("--streaming true: this recipe rewrites all prepared rows (finish); give --streaming false")
        stream = Stream(
            stream_files(rows, str(data.dataset)), type(self), self.tokenizer, data.encoding,
            per_step=self.place.batch, steps=train["max_steps"],
            seed=train["seed"] if train["data_seed"] is None else train["data_seed"],
            shuffle=train["train_sampling_strategy"] == "random", packing=data.packing, skip_bad_rows=data.skip_bad_rows,
            check_ids=partial(check_ids, tokenizer=self.tokenizer, rows=embedding_rows(self.model_config)),
        )  # fmt: skip
        self.place.notes += stream.notes()
        return stream

    def _begin_stream(self, stream: Stream, changed: list[str]) -> None:
        """Read the first window, or the one that the checkpoint lies in.

        Raises:
            UserError: a row at fault, or files that differ between the ranks or from the checkpoint's.
        """
        if len(set(self.orders.all_gather(stream.fingerprint))) > 1:
            raise UserError(f"--dataset {self.config.data.dataset}: the ranks see different files, so they would skip rows")
        if "data" in changed:
            raise UserError("--allow_changed data: a stream resumes by position, which other data do not have")
        stream.begin(read_progress(self.checkpoint)["stream"] if self.checkpoint else None)

    def _check_best_metric(self) -> None:
        """Refuse a --metric_for_best_model that no evaluation reports, before the first step."""
        name = self.args.metric_for_best_model
        if name is None or "validation" not in self.splits:
            return
        figures = evaluated_figures(self)
        if figures is not None and name.removeprefix("eval_") not in figures:
            raise UserError(
                f"--metric_for_best_model {name}: an evaluation has no such figure{nearest(name, figures)}; "
                f"choose from {', '.join(figures)}"
            )

    def _open_folder(self) -> None:
        """Send the log to the run folder, and write what the run is."""
        if self.config.train["dry_run"]:
            return
        self.console.log_to(self.folder.console)
        if self.console.main:
            artifacts.write_start(self.folder, self.config, self.place)
            self._write_data(self._resumes_at()[0])

    def _write_data(self, step: int) -> dict[str, Any] | None:
        """Write data.json; returns what became of the rows of a stream up to a step."""
        streamed = self.stream.facts(step) if self.stream else None
        artifacts.write_data(self.folder, self.splits, self.sequences, streamed)
        return streamed

    def _watch(self) -> Watchdog:
        ranks = self.place.ranks
        first = ranks.rank - ranks.local_rank
        return Watchdog(
            self.folder.path, ranks.rank, range(first, first + ranks.local_world), hang_timeout=self.args.hang_timeout,
            slow_timeout=self.args.ddp_timeout, error_fd=self.console.error_fd,
        )  # fmt: skip

    def places_of(self, rows: list[int]) -> str:
        """Where training rows came from: files and lines."""
        if self.stream:
            return self.stream.places(rows)
        block = self.config.data.max_length if self.cut_into_blocks else None
        return "; ".join(
            RowSources(path).describe(numbers, block) for path, numbers in self.sequences["train"].by_file(rows)
        )

    def _stood_at(self) -> str:
        trainer = getattr(self, "trainer", None)
        return f"in step {trainer.state.global_step + 1}" if trainer else "while the model was loaded"

    def _resumes_at(self) -> tuple[int, bool]:
        """The step where the run goes on, and whether its evaluation is still due."""
        return step_of(self.checkpoint) if self.checkpoint else (0, False)

    def _finish(self, trainer: RecipeTrainer, began: float) -> RunResult:
        self.watch.enter("finishing")
        self.console.say("saving the model")
        self._save_model(trainer)
        save_reference(self, trainer)
        metrics: dict[str, Any] = {"step": trainer.state.global_step, "train_loss": trainer.last_loss()}
        for name, prefix in (("validation", "eval"), ("test", "test")):
            if name not in self.splits:
                continue
            last = next((line for line in reversed(trainer.state.log_history) if f"{prefix}_loss" in line), {})
            wanted = None if trainer.causal else self.metrics(self.splits[name])
            stale = last.get("step") != trainer.state.global_step or self.args.load_best_model_at_end
            if stale or (wanted and not trainer.details):
                trainer.compute_metrics = wanted
                last = trainer.evaluate(self.sequences[name], metric_key_prefix=prefix)
                self.watch.enter("finishing")
            metrics |= {key: value for key, value in last.items() if key.startswith(f"{prefix}_")}
            metrics |= {f"{prefix}_{key}": value for key, value in trainer.details.items()}
        result = RunResult(self.folder.path, trainer.state.global_step, metrics)
        problem: str | None = None
        if self.console.main:
            artifacts.write_metrics(self.folder, metrics)
            self.write_extras(self.folder.path)
            draw_curve(
                self.folder.log,
                self.folder.curve,
                f"{self.config.layers.recipe.name}: {self.config.model.model_name_or_path}",
            )
            if self.config.train["verify_model"]:
                self.console.say("verifying the model")
                problem = verify_apart(self.folder)
            self._write_page()
            streamed = self._write_data(result.step)
            self.console.say(summary.footer(self.config, result, self.folder, time.monotonic() - began, streamed))
        trainer.accelerator.wait_for_everyone()
        if problem:
            raise UserError(problem)
        return result

    def _save_model(self, trainer: RecipeTrainer) -> None:
        """Save beside model/, and take its place when all is on the disk."""
        beside = self.folder.path / "model.writing"
        try:
            if self.console.main:
                shutil.rmtree(beside, ignore_errors=True)
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(beside))
            trainer.accelerator.wait_for_everyone()
            if self.console.main:
                for path in beside.rglob("*"):
                    sync(path)
                put_in_place(beside, self.folder.model)
            trainer.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_write_error(error):
                raise
            why = str(error).splitlines()[0]
            raise UserError(
                f"the model could not be saved into {self.folder.path}: {why}. {trainer.last_whole()}"
            ) from error

    def _write_page(self) -> None:
        """report.html; the run is whole without it, so whatever fails there is told and no more."""
        from dsrecipes.reporting.report import report as write_page

        try:
            write_page(self.folder.path)
        except Exception as error:
            self.console.say(f"{'report':<10}not written: {error}")


def evaluated_figures(recipe: RecipeBase) -> list[str] | None:
    """Names of what an evaluation reports; None where the recipe's metrics fail on a prediction of zeros."""
    figures = ["loss"]
    if recipe.auto_class.endswith("ForCausalLM"):
        figures.append("perplexity")
    elif (metrics := recipe.metrics(recipe.splits["validation"])) is not None:
        try:
            labels = np.asarray(recipe.splits["validation"].data["labels"][:])
            classes = recipe.model_config.num_labels
            if np.issubdtype(labels.dtype, np.integer):
                classes = max(int(labels.max()) + 1, classes)
            values = metrics(EvalPrediction(np.zeros((len(labels), classes), dtype=np.float32), labels))
        except Exception:
            return None
        figures += [name for name, figure in values.items() if not isinstance(figure, dict)]
    parts = recipe.splits["validation"].parts if recipe.config.data.is_mixture else {}
    figures += [f"{name}_{figure}" for name in parts for figure in figures if figure in ("loss", "perplexity")]
    return [*figures, "runtime", "samples_per_second", "steps_per_second"]


class _DryRunEnds(Exception):
    """Raised before the first step of a dry run."""


class _FirstAndLastStep(TrainerCallback):
    """Engine and optimizer stand: check and show them, write the resolved ZeRO JSON, end a dry run. Log the last step."""

    def __init__(self, recipe: RecipeBase, trainer: RecipeTrainer) -> None:
        self.recipe, self.trainer = recipe, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recipe, trainer = self.recipe, self.trainer
        engine = trainer.deepspeed if recipe.place.zero else None
        if engine is not None:
            recipe.place.check_engine(engine)
            report_gradient_norm(engine)
        recipe.console.say(summary.header(recipe.config, recipe.place, recipe.splits, recipe.sequences, trainer))
        data = trainer.train_dataset.sample
        if args.audit and trainer.causal and not recipe.cut_into_blocks:
            check_ends(data, recipe.tokenizer, trainer.model)
        largest_batch = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
        sample = packed_sample(
            data, largest_batch, later=recipe.stream is not None and recipe.stream.capacity is not None,
            collate=trainer.data_collator, forward=trainer.loss_and_logits, exact=recipe.place.precision == "fp32",
        )  # fmt: skip
        if sample is not None:
            isolate_examples(trainer.model, sample, args.device, choose=recipe.config.model.attn_implementation is None)
        if args.dry_run:
            recipe.console.say(summary.first_example(trainer, recipe.tokenizer))
            shutil.rmtree(recipe.folder.path)
            raise _DryRunEnds
        if engine is not None and recipe.console.main:
            artifacts.write_ds_config(recipe.folder, trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the last step whatever logging_steps is: it is the run's result. A stream says which epoch it is in."""
        if self.recipe.stream:
            state.epoch = self.recipe.stream.epoch(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True


def recipe_class(files: RecipeFiles) -> type[RecipeBase]:
    """The one RecipeBase subclass that a recipe's module defines.

    Raises:
        UserError: the file does not parse, or defines none or several, or one that lacks a method.
    """
    try:
        module = files.load()
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except ImportError as error:
        if str(files.module).startswith("dsrecipes."):
            raise
        raise UserError(f"{files.module}: {error}") from error
    found = [
        each for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, RecipeBase) and each.__module__ == module.__name__
    ]  # fmt: skip
    if len(found) != 1:
        raise UserError(
            f"{files.module}: expected one class derived from RecipeBase, found {[each.__name__ for each in found]}"
        )
    missing = sorted(found[0].__abstractmethods__)
    if missing:
        raise UserError(
            f"{files.module}: {found[0].__name__} lacks the {inflect(len(missing), 'method')} {', '.join(missing)}"
        )
    if found[0].auto_class.endswith("ForCausalLM") and found[0].metrics is not RecipeBase.metrics:
        raise UserError(
            f"{files.module}: {found[0].__name__}.metrics is never called: the evaluation of a causal language model keeps "
            "no logits and reports the perplexity. Remove the method, or set auto_class"
        )
    return found[0]


def load_recipe(recipe: str, **values: Any) -> RecipeBase:
    """A recipe by name, .py file or module, with values for any flag: load_recipe("gpt2_clm", max_steps=10).run().

    Raises:
        UserError: unknown recipe or key, a value of the wrong type.
    """
    layers = layer({"recipe": recipe, **values}, origin="python")
    return recipe_class(layers.recipe)(layers)


Metrics = Callable[[EvalPrediction], dict[str, float]]
