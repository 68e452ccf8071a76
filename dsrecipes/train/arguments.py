"""Which TrainingArguments does a run have, and did the ranks, engine and device that were requested really start?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import EvalPrediction

from dsrecipes.base import Metrics
from dsrecipes.config.checks import best_metric
from dsrecipes.config.find import is_shipped
from dsrecipes.config.flags import JUDGED_SCHEDULES
from dsrecipes.config.train_config import TrainConfig
from dsrecipes.errors import UserError, nearest
from dsrecipes.train.precheck import check_parts
from dsrecipes.train.state import Prepared
from dsrecipes.zero.blocks import keep_fixed_steps, try_engine
from dsrecipes.zero.process import check_started


def start_process_group(prepared: Prepared) -> TrainConfig:
    """Build TrainConfig, which creates the process group, and check that what was requested is what started.

    Raises:
        UserError: values contradict each other, or something else has started.
    """
    setup, values = prepared.setup, dict(prepared.config.train)
    if "validation" not in prepared.rows.splits:
        _refuse_options_that_need_evaluations(values)
        values["eval_strategy"] = "no"
    values |= {
        # until the ranks have agreed on the run folder, for which they need the process group
        "output_dir": tempfile.gettempdir(),
        "deepspeed": prepared.engine,
        "use_cpu": setup.device == "cpu",
        "bf16": setup.precision == "bf16",
        "fp16": setup.precision == "fp16",
        "per_device_train_batch_size": setup.micro,
        "gradient_accumulation_steps": setup.accumulation,
        # Training.run passes the checkpoint to train(), once its files are checked
        "resume_from_checkpoint": None,
        "disable_tqdm": True,
        # batches have keys that forward() does not take, such as the weights of rows
        "remove_unused_columns": False,
        # early stopping counts on from where the checkpoint was
        "restore_callback_states_from_checkpoint": True,
    }
    values |= best_metric(values)
    try:
        args = TrainConfig(**values)
    except ValueError as error:
        raise UserError("DSR351", str(error)) from error
    # train/recorder.py writes the curves: it truncates them on resuming, and a full disk does not end the training
    args.report_to = [name for name in args.report_to if name != "tensorboard"]
    if prepared.engine is not None:
        keep_fixed_steps(args.hf_deepspeed_config, prepared.engine)
    check_started(setup.zero.stage if setup.zero else None, setup.ranks, args)
    return args


def _refuse_options_that_need_evaluations(train: dict[str, Any]) -> None:
    options = {
        "load_best_model_at_end": train["load_best_model_at_end"],
        "early_stopping_patience": train["early_stopping_patience"],
        "save_strategy best": train["save_strategy"] == "best",
        f"lr_scheduler_type {train['lr_scheduler_type']}": train["lr_scheduler_type"] in JUDGED_SCHEDULES,
    }
    for flag, is_set in options.items():
        if is_set:
            raise UserError("DSR352", f"--{flag}: there are no validation rows; give --eval_dataset or --validation_split")


def check_arguments(prepared: Prepared, args: TrainConfig, metrics: Callable[[Prepared], Metrics | None]) -> None:
    """Refuse what would fail minutes later: optimizer, schedule, trackers, a ZeRO JSON, the metric's name (UserError).

    Args:
        prepared: its notes get lines on values with an unexpected effect.
        args: of the run.
        metrics: makes the figures of the validation rows.
    """
    setup, engine, config = prepared.setup, prepared.engine, prepared.config
    setup.notes += check_parts(args, prepared.steps, engine, config.own)
    # the shipped JSON files start in our tests already
    if engine is not None and setup.zero is not None and not is_shipped(setup.zero.path) and not setup.zero.uses_nvme:
        try_engine(engine, setup.zero.path)
    if args.metric_for_best_model is not None:
        check_best_metric(prepared, args.metric_for_best_model, metrics(prepared))
    if config.train["neftune_noise_alpha"] and prepared.packs:
        setup.notes.append(
            "NEFTune scales its noise by the length of a whole packed sequence; with --packing false, of a row"
        )


def check_best_metric(prepared: Prepared, name: str, metrics: Metrics | None) -> None:
    """Refuse a --metric_for_best_model that no evaluation reports, before the first step (UserError)."""
    if "validation" not in prepared.rows.splits:
        return
    figures = evaluated_figures(prepared, metrics)
    if figures is not None and name.removeprefix("eval_") not in figures:
        raise UserError(
            "DSR353",
            f"--metric_for_best_model {name}: an evaluation has no such figure{nearest(name, figures)}; "
            f"choose from {', '.join(figures)}",
        )


def evaluated_figures(prepared: Prepared, metrics: Metrics | None) -> list[str] | None:
    """Names of what an evaluation reports; None where the recipe's metrics fail on a prediction of zeros."""
    split = prepared.rows.splits["validation"]
    figures = ["loss"]
    if prepared.recipe.auto_class.endswith("ForCausalLM"):
        figures.append("perplexity")
    elif metrics is not None:
        try:
            labels = np.asarray(split.data["labels"][:])
            classes = int(prepared.model_config.num_labels or 0)
            if np.issubdtype(labels.dtype, np.integer):
                classes = max(int(labels.max()) + 1, classes)
            values = metrics(EvalPrediction(np.zeros((len(labels), classes), dtype=np.float32), labels))
        except Exception:
            # a user's recipe may need real predictions; the name is then checked by the first evaluation
            return None
        figures += [name for name, figure in values.items() if not isinstance(figure, dict)]
    parts = getattr(split, "parts", {}) if prepared.config.data.is_mixture else {}
    figures += [f"{name}_{figure}" for name in parts for figure in figures if figure in ("loss", "perplexity")]
    return [*figures, "runtime", "samples_per_second", "steps_per_second"]
