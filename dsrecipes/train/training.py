"""How does a run go, from a recipe to a finished run folder? Training: prepare, start, train, finish."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.utils.logging import disable_progress_bar

from dsrecipes.base import Metrics, RecipeBase, RunResult
from dsrecipes.config.flags import without_effect
from dsrecipes.config.train_config import TrainConfig
from dsrecipes.config.values import seconds_of
from dsrecipes.data.audit import stop_at_ends
from dsrecipes.data.streamable import check_streaming
from dsrecipes.errors import UserError
from dsrecipes.io.caches import check_docstrings, redirect_caches
from dsrecipes.launch.signals import StopSignals
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.model.cached_models import random_weights
from dsrecipes.model.checks import check_attention, check_model
from dsrecipes.model.configuration import load_config
from dsrecipes.model.modalities import unreached_note
from dsrecipes.model.quantization import disable_cpu_packing
from dsrecipes.model.task import is_causal_lm, pad_id
from dsrecipes.model.tokenizer import check_vocabulary
from dsrecipes.recipe_class import call_hook
from dsrecipes.runs.folder import RunFolder
from dsrecipes.train import artifacts
from dsrecipes.train.arguments import check_arguments, start_process_group
from dsrecipes.train.callbacks import DryRunEnded, StartAndEnd
from dsrecipes.train.diagnosis import check_step
from dsrecipes.train.environment import RunEnvironment
from dsrecipes.train.failures import FAILURES, Progress, explain
from dsrecipes.train.finishing import finish_run, write_data
from dsrecipes.train.first_step import FirstStep
from dsrecipes.train.header import loading
from dsrecipes.train.identity import check_identity, run_identity
from dsrecipes.train.preparing import make_sequences, packs, prepare_rows, read_first_rows, take_notes, unused_settings
from dsrecipes.train.recorder import Recorder
from dsrecipes.train.run_folder import choose_checkpoint, choose_folder, claim_folder
from dsrecipes.train.saving import CheckpointContext, step_of
from dsrecipes.train.setup import RunSetup, resolve_setup
from dsrecipes.train.state import Prepared, Run
from dsrecipes.train.trainer import RecipeTrainer
from dsrecipes.zero.rank_group import rank_group


class Training:
    """A run of one recipe: prepared, started, trained, finished."""

    def __init__(self, recipe: RecipeBase) -> None:
        """Set up; nothing is loaded yet."""
        self.recipe, self.config, self.console = recipe, recipe.config, recipe.console
        self.environment = RunEnvironment()
        self.progress = Progress()
        self.started: Run | None = None
        """The run, once `start` has returned; for whoever looks at it afterwards."""

    def run(self) -> RunResult:
        """Train, save the model, evaluate, and leave one run folder that holds everything.

        Raises:
            UserError: whatever the user can fix.
            RunStopped: a signal or --time_limit ended the run; it is saved and can resume.
        """
        began = time.monotonic()
        with self.environment:
            try:
                run = self._start_or_restore()
                try:
                    run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
                except DryRunEnded:
                    return RunResult(run.folder.path, run.trainer.state.global_step, {})
                return finish_run(run, self.recipe, began)
            except FAILURES as error:
                # a collective that failed only because another rank died is reported by that rank, or by its watchdog
                if self.environment.watchdog is not None:
                    self.environment.watchdog.exit_if_peer_left(error)
                explained = explain(error, self.config, self.progress, self.folder)
                if explained is None:
                    raise
                raise explained from error

    def build_trainer(self) -> RecipeTrainer:
        """Everything up to the trainer, which whoever calls this trains.

        The environment is entered and not left: the trainer's callbacks refer to the run, which holds it.
        """
        self.environment.__enter__()
        return self.start(self.prepare()).trainer

    @property
    def folder(self) -> RunFolder | None:
        """The run folder, once the run has claimed it."""
        return self.environment.folder.folder if self.environment.folder else None

    def _start_or_restore(self) -> Run:
        """Prepare and start; a run that is refused leaves its folder as it was."""
        try:
            run = self.start(self.prepare())
        except UserError:
            if self.environment.folder and (self.console.main or self.config.train["dry_run"]):
                self.environment.folder.restore()
            raise
        if self.console.main and self.environment.folder:
            self.environment.folder.delete_replaced()
        return run

    # ---- prepare: rows and configuration, before the ranks connect ----

    def prepare(self) -> Prepared:
        """Read configuration and tokenizer, and turn rows into sequences.

        Data come before the process group, because only one rank prepares them while the others wait on a lock file.
        """
        recipe, config = self.recipe, self.config
        setup = self._resolve_setup()
        named_folder, candidates = choose_folder(config, setup, self.console.say)
        self.console.say(loading(config.model))
        model_config, engine, tokenizer = self._load_descriptions(setup)
        rows = prepare_rows(recipe, setup, tokenizer, model_config)
        self.environment.stream = rows.stream
        call_hook(recipe, "configure", model_config=model_config, splits=rows.splits)
        take_notes(recipe, setup)
        if recipe.auto_class.endswith("ForSequenceClassification"):
            # a decoder's classifier reads each row's last token, which is the last one that is not this padding
            model_config.get_text_config().pad_token_id = pad_id(tokenizer)
        sequences = make_sequences(recipe, setup, rows, model_config)
        if config.model.from_scratch:
            random_weights(model_config, recipe.auto_class, config.train["seed"])
        return Prepared(
            recipe=type(recipe),
            config=config,
            setup=setup,
            console=self.console,
            engine=engine,
            model_config=model_config,
            tokenizer=tokenizer,
            rows=rows,
            sequences=sequences,
            packs=packs(recipe),
            named_folder=named_folder,
            candidates=candidates,
        )

    def _resolve_setup(self) -> RunSetup:
        """Decide on ranks, device, precision and batch, and introduce the run."""
        config, train = self.config, self.config.train
        check_docstrings()
        cache_note = redirect_caches()  # for use from Python; dsrecipes.run has already done it
        setup = resolve_setup(config)
        self.progress.setup = setup
        values = {**vars(config.model), **vars(config.data), **train}
        setup.notes += without_effect(values, config.own, setup.zero is not None)
        setup.notes += unused_settings(self.recipe)
        if config.data.streaming:
            setup.notes += check_streaming(config, self.recipe.auto_class)
        self.console.main = setup.ranks.rank == 0
        if not self.recipe.introduced:
            self.console.say(config.layers.first_line())
        if cache_note:
            self.console.say(f"{'cache':<10}{cache_note}")
        if not train["verbose"]:
            disable_progress_bar()  # transformers' own, of reading and writing shards
        return setup

    def _load_descriptions(self, setup: RunSetup) -> tuple[PretrainedConfig, dict[str, Any] | None, PreTrainedTokenizerBase]:
        """The model's configuration, the resolved ZeRO JSON and the tokenizer, each checked against the others."""
        config, auto_class = self.config, self.recipe.auto_class
        model_config = load_config(config.model, auto_class)
        stage = setup.zero.stage if setup.zero else None
        check_model(model_config, config.model, config.data.max_length, stage)
        engine = setup.resolve_zero(config, model_config)
        tokenizer = self.recipe.load_tokenizer()
        padding = check_vocabulary(tokenizer, model_config)
        setup.notes += [*config.notes, *([padding] if padding else [])]
        check_attention(config.model, model_config, auto_class)
        if config.model.lora_target_modules:
            from dsrecipes.model.lora_targets import check_targets

            check_targets(config.model, model_config, auto_class)
        return model_config, engine, tokenizer

    # ---- start: ranks, folder, checkpoint, model, trainer ----

    def start(self, prepared: Prepared) -> Run:
        """Create the process group, claim the folder, choose the checkpoint, load the model and build the trainer."""
        train = self.config.train
        args = start_process_group(prepared)
        check_arguments(prepared, args, self._validation_metrics)
        limit = seconds_of(train["time_limit"]) if train["time_limit"] else None
        signals = StopSignals(limit, rank_group(args.ddp_timeout_delta))
        claimed = claim_folder(prepared.named_folder, prepared.candidates, self.config, signals, self.console.main)
        self.environment.folder, folder = claimed, claimed.folder
        args.output_dir = str(folder.path)
        checkpoint = choose_checkpoint(prepared.candidates, prepared.setup.ranks, signals, self.console.say)
        identity = run_identity(prepared)
        changed = check_identity(checkpoint, identity, train["allow_changed"]) if checkpoint else []
        read_first_rows(prepared, signals, checkpoint, changed)
        if not train["dry_run"]:
            self.console.log_to(folder.console)
            if self.console.main:
                artifacts.write_start(folder, self.config, prepared.setup)
                write_data(folder, prepared, step_of(checkpoint)[0] if checkpoint else 0)
        # not earlier: its records are in the run folder; not later: loading weights is where ranks run out of memory
        watchdog = self._watch(prepared, args, folder)
        context = CheckpointContext(folder, prepared.setup.made_by(), identity, signals, self.console.say, changed)
        trainer = self._build_trainer(prepared, args, watchdog, context)
        self.started = Run(
            prepared=prepared,
            args=args,
            folder=folder,
            checkpoint=checkpoint,
            signals=signals,
            watchdog=watchdog,
            trainer=trainer,
            environment=self.environment,
        )
        self._add_callbacks(self.started)
        return self.started

    def _validation_metrics(self, prepared: Prepared) -> Metrics | None:
        """The recipe's figures for validation rows; a causal model's evaluation keeps no logits for any."""
        splits, config = prepared.rows.splits, prepared.model_config
        if "validation" not in splits or self.recipe.auto_class.endswith("ForCausalLM"):
            return None
        return call_hook(self.recipe, "metrics", split=splits["validation"], train=splits["train"], model_config=config)

    def _watch(self, prepared: Prepared, args: TrainConfig, folder: RunFolder) -> Watchdog:
        ranks = prepared.setup.ranks
        first = ranks.rank - ranks.local_rank
        self.environment.watchdog = Watchdog(
            folder.path,
            ranks.rank,
            range(first, first + ranks.local_world),
            hang_timeout=args.hang_timeout,
            slow_timeout=args.ddp_timeout,
            error_fd=self.console.error_fd,
        )
        return self.environment.watchdog

    def _load_model(self, prepared: Prepared) -> PreTrainedModel:
        setup = prepared.setup
        dtype, deepspeed = setup.dtype(self.config.model), setup.zero is not None
        model = call_hook(self.recipe, "load_model", model_config=prepared.model_config, dtype=dtype, deepspeed=deepspeed)
        self.progress.model = model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                "DSR367", f"model {self.config.model.model_name_or_path}: it has no parameter that can be trained"
            )
        if is_causal_lm(model) and not self.recipe.cut_into_blocks:
            setup.notes += stop_at_ends(prepared.train_data.sample, prepared.tokenizer, model)
        disable_cpu_packing(model)  # a recipe's own load_model may not have done it
        return model

    def _build_trainer(
        self, prepared: Prepared, args: TrainConfig, watchdog: Watchdog, context: CheckpointContext
    ) -> RecipeTrainer:
        model, data = self._load_model(prepared), prepared.train_data
        trainer = RecipeTrainer(
            model=model,
            args=args,
            data_collator=call_hook(self.recipe, "collator", model=model, tokenizer=prepared.tokenizer),
            train_dataset=data,
            eval_dataset=prepared.sequences.get("validation"),
            processing_class=prepared.tokenizer,
            watchdog=watchdog,
            weighted=any(sequences.weighted for sequences in (data, *prepared.sequences.values())),
            context=context,
            compute_metrics=self._validation_metrics(prepared),
        )
        self.progress.trainer = trainer
        unreached = unreached_note(model)
        prepared.setup.notes += [trainer.step_loss.router.note()] if trainer.step_loss.router else []
        prepared.setup.notes += [unreached] if unreached else []
        return trainer

    def _add_callbacks(self, run: Run) -> None:
        """In the order in which they act: the first step is audited before its header is printed, and rank 0 records last."""
        trainer, train = run.trainer, self.config.train
        trainer.step_end.check = partial(check_step, run)
        trainer.remove_callback(PrinterCallback)
        if train["early_stopping_patience"]:
            trainer.add_callback(EarlyStoppingCallback(train["early_stopping_patience"]))
        if train["audit"]:
            trainer.add_callback(FirstStep(run))
        trainer.add_callback(StartAndEnd(run))
        for callback in self.recipe.callbacks():
            trainer.add_callback(callback)
        if self.console.main and not train["dry_run"]:
            trainer.add_callback(Recorder(run.folder, self.console, *run.start))
