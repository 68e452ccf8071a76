"""Which training values are refused before the data are prepared, and which evaluation is the best?

TrainingArguments would refuse most of these only once it is built, minutes later; its messages do not name our flags.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from dsrecipes.config.flags import JUDGED_SCHEDULES
from dsrecipes.config.values import seconds_of
from dsrecipes.errors import UserError, nearest

ABOVE_ZERO = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "early_stopping_patience",
    "global_batch_size",
)
"""Numbers that must be above 0 where they are given."""
NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "hang_timeout", "neftune_noise_alpha")
SEEDS = ("seed", "data_seed")
SAMPLING = ("random", "sequential")
"""The values of train_sampling_strategy that a run with fixed steps can honor."""
_SMALLER_IS_BETTER = ("loss", "perplexity", "ppl", "error", "wer", "cer", "ter", "mae", "mse", "rmse", "runtime")
"""Last words in the names of metrics whose smaller values are better."""


def check_train(
    train: Mapping[str, Any],
    given: Mapping[str, str],
    choices: Mapping[str, Collection[str]],
    json_fields: Collection[str],
) -> None:
    """Check the values of a training run, by flag.

    Args:
        train: flag -> value; None where nobody gave one.
        given: flag -> origin, for messages.
        choices: flag -> the words that it takes.
        json_fields: flags whose value is the text of a JSON object.

    Raises:
        UserError: names the flag to change.
    """
    for name, words in choices.items():
        if train[name] not in words:
            known = ", ".join(words)
            raise UserError("DSR045", f"--{name} {train[name]}{nearest(str(train[name]), words)}: choose from {known}")
    for name in json_fields:
        # deepspeed is a name or a path here, which find_zero has resolved.
        if name != "deepspeed" and train[name] is not None:
            _check_json(name, train[name], given.get(name, "flag"))
    _check_numbers(train)
    if "tpu_metrics_debug" in (train["debug"] or ()):
        raise UserError("DSR045", "--debug tpu_metrics_debug: TPUs are not supported; choose underflow_overflow")
    if train["train_sampling_strategy"] not in SAMPLING:
        raise UserError(
            "DSR045",
            f"--train_sampling_strategy {train['train_sampling_strategy']}: rows are assigned to steps beforehand; choose "
            f"{' or '.join(SAMPLING)}",
        )
    if train["time_limit"]:
        seconds_of(train["time_limit"])
    if train["fp16"] and train["bf16"]:
        raise UserError("DSR051", "--fp16 and --bf16 are both on: choose one")
    _check_evaluations(train)


def _check_json(name: str, text: str, origin: str) -> None:
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError as error:
        raise UserError("DSR048", f"--{name} {text}: not JSON ({error}); {origin}") from None
    if not is_object:
        raise UserError("DSR048", f"--{name} {text}: give a JSON object, such as '{{\"key\": 1}}'")


def _check_numbers(train: Mapping[str, Any]) -> None:
    # Each condition says what must hold, because NaN compares false with everything and must be refused too.
    steps = train["max_steps"]
    too_large = [name for name, value in train.items() if isinstance(value, (int, float)) and not abs(value) < 2**63]
    faults = [(name, "give a number that is finite and below 2**63") for name in too_large]
    faults += [(name, "give 0 up to 2**32 - 1") for name in SEEDS if not 0 <= (train[name] or 0) < 2**32]
    faults += [(name, "give a number above 0") for name in ABOVE_ZERO if train[name] is not None and not train[name] > 0]
    if steps != -1 and not steps > 0:
        faults.append(("max_steps", "give 1 or more, or -1 for --num_train_epochs"))
    faults += [(name, "give 0 or more") for name in NOT_NEGATIVE if not (train[name] or 0) >= 0]
    for name, advice in faults:
        raise UserError("DSR047", f"--{name} is {train[name]}: {advice}")


def _check_evaluations(train: Mapping[str, Any]) -> None:
    """Refuse what follows a metric where nothing is evaluated, and a best model that no checkpoint holds."""
    needs = [f"lr_scheduler_type {schedule}" for schedule in JUDGED_SCHEDULES if train["lr_scheduler_type"] == schedule]
    needs += ["save_strategy best"] if train["save_strategy"] == "best" else []
    needs += ["load_best_model_at_end true"] if train["load_best_model_at_end"] else []
    needs += ["early_stopping_patience"] if train["early_stopping_patience"] is not None else []
    if needs and train["eval_strategy"] == "no":
        raise UserError("DSR050", f"--{needs[0]} needs evaluations: give --eval_strategy steps or epoch")
    if not train["load_best_model_at_end"]:
        return
    # The best model is reloaded from its checkpoint, so every evaluation needs a full one.
    if train["save_only_model"]:
        raise UserError("DSR052", "--save_only_model leaves nothing for --load_best_model_at_end to load: drop one of them")
    if train["save_strategy"] not in ("best", train["eval_strategy"]):
        raise UserError("DSR052", "--load_best_model_at_end needs --save_strategy best, or the same as --eval_strategy")


def best_metric(train: Mapping[str, Any]) -> dict[str, Any]:
    """The values that decide which evaluation is the best, with defaults for those that were not given.

    transformers takes a higher value of every metric except a loss as better, while a schedule that follows a metric takes
    a lower one as better. Both get the same answer here.
    """
    name, greater = train["metric_for_best_model"], train["greater_is_better"]
    follows_metric = train["lr_scheduler_type"] in JUDGED_SCHEDULES
    if name is None and (follows_metric or train["early_stopping_patience"] or train["save_strategy"] == "best"):
        name = "loss"
    if name is not None and greater is None:
        # A recipe may add a metric of any name, so only its last word says what it is.
        greater = name.lower().rsplit("_", 1)[-1] not in _SMALLER_IS_BETTER
    options = json.loads(train["lr_scheduler_kwargs"] or "{}")
    if follows_metric and greater:
        # A mode that the user gives wins.
        options = {"mode": "max"} | options
    return {
        "metric_for_best_model": name,
        "greater_is_better": greater,
        "lr_scheduler_kwargs": json.dumps(options) if options else None,
    }
