"""Which flags of transformers.TrainingArguments work here, which have one fixed value, and which were removed?

Imports neither torch nor transformers, like layers.py. tests/config/test_flags.py fails where a field is in no table, so
a flag that a new transformers adds cannot slip through undecided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dsrecipes.errors import UserError, coded, nearest
from dsrecipes.io.paths import starter_path, user_path

Merged = dict[str, tuple[Any, str]]
"""Key -> (value, origin), as the layers of a configuration give them."""
JUDGED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Learning rate schedules that follow a metric of the evaluations."""

_EXPORT = "nothing is uploaded while training; afterwards `dsrecipes export RUN --to DIR`, then `hf upload NAME DIR`"
_LOADER = "rows are assigned to steps beforehand, from the seed and the step alone"
_EVALUATION = "the evaluation sums losses over labels and keeps what the recipe's metrics need"
_ONE_WAY = "it has no replacement; leave it out"

# Refused instead of ignored, so that nobody believes that such a flag has an effect.
FIXED: dict[str, tuple[Any, str]] = {
    "accelerator_config": (None, f"{_LOADER}; the batch is set by --global_batch_size"),
    "auto_find_batch_size": (False, "the rows of a step are assigned beforehand; give --per_device_train_batch_size"),
    "average_tokens_across_devices": (True, "false would weight the tokens of the ranks unequally"),
    "batch_eval_metrics": (False, "a recipe's metrics see all rows at once"),
    "bf16_full_eval": (False, "evaluation runs in the precision of the training"),
    "dataloader_drop_last": (False, "the last step is padded with empty rows, so nothing is dropped"),
    "dataloader_in_order": (True, _LOADER),
    "do_eval": (True, "validation rows are always evaluated when training ends; --eval_strategy adds evaluations"),
    "do_predict": (False, "`dsrecipes generate RUN` writes answers, `dsrecipes evaluate RUN` scores them"),
    "do_train": (
        True,
        "this command trains; `dsrecipes evaluate RUN` evaluates without training, --dry_run stops before the first step",
    ),
    "enable_jit_checkpoint": (False, "SIGTERM and SIGUSR1 save a checkpoint without it; see also --time_limit"),
    "eval_accumulation_steps": (None, "evaluation moves its results to the CPU after each batch"),
    "eval_do_concat_batches": (True, "a recipe's metrics see all rows at once"),
    "eval_use_gather_object": (False, _EVALUATION),
    "fp16_full_eval": (False, "evaluation runs in the precision of the training"),
    "fsdp": (None, "ZeRO shards the model here; see --deepspeed"),
    "fsdp_config": (None, "ZeRO shards the model here; see --deepspeed"),
    "hub_always_push": (False, _EXPORT),
    "hub_model_id": (None, _EXPORT),
    "hub_private_repo": (None, _EXPORT),
    "hub_revision": (None, _EXPORT),
    "hub_strategy": ("every_save", _EXPORT),
    "hub_token": (None, "nothing is uploaded while training; to read gated models set HF_TOKEN or run `hf auth login`"),
    "ignore_data_skip": (False, "a resumed run continues with the next rows, which takes no time here"),
    "include_for_metrics": (None, "a recipe's metrics see logits and labels"),
    "include_num_input_tokens_seen": ("no", "log.jsonl has tokens_per_second, without padding"),
    "label_names": (None, "the labels of a recipe are its column `labels`"),
    "label_smoothing_factor": (
        0,
        "the loss is computed only at labeled positions, which Trainer's label smoothing does not support",
    ),
    "length_column_name": ("length", "lengths are counted when the rows are tokenized"),
    "liger_kernel_config": (None, "Liger's kernels are not used; see --use_liger_kernel"),
    "local_rank": (-1, "the launcher sets the rank; `--procs N` starts N of them"),
    "parallelism_config": (None, "ZeRO shards the model here; see --deepspeed"),
    "prediction_loss_only": (False, "evaluation gathers what the recipe's metrics need, no more"),
    "push_to_hub": (False, _EXPORT),
    "restore_callback_states_from_checkpoint": (True, "a resumed run restores everything"),
    "save_on_each_node": (False, "all machines write into one shared run folder"),
    "skip_memory_metrics": (True, "log.jsonl has peak_memory_gb"),
    "use_cache": (False, "training needs no key-value cache, and with one packed examples would attend to each other"),
    "use_liger_kernel": (
        False,
        "Liger's fused loss does not support logits_to_keep, and logits are computed only at labeled positions here",
    ),
}
"""Flag with one value here -> (that value, why, and what to use instead)."""

WORKS = frozenset(
    "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules "
    "gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs "
    "gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode "
    "neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node "
    "logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start "
    "save_only_model save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model "
    "greater_is_better full_determinism seed data_seed use_cpu dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context remove_unused_columns "
    "train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
    "ddp_backend ddp_timeout deepspeed debug resume_from_checkpoint".split()
)
"""Flags that do what transformers documents; both values of remove_unused_columns do the same, since rows hold only tokens."""

REMOVED = {
    "adafactor": "--optim adafactor",
    "dispatch_batches": _ONE_WAY,
    "evaluation_strategy": "--eval_strategy",
    "fp16_backend": "--fp16 true",
    "fp16_opt_level": "--fp16 true",
    "fsdp_min_num_params": "--deepspeed zero3",
    "fsdp_transformer_layer_cls_to_wrap": "--deepspeed zero3",
    "group_by_length": "--packing true fills the sequences, so their lengths are equal",
    "half_precision_backend": "--fp16 true or --bf16 true",
    "include_inputs_for_metrics": _ONE_WAY,
    "include_tokens_per_second": "log.jsonl always has tokens_per_second",
    "jit_mode_eval": "--torch_compile true",
    "logging_dir": "TensorBoard's files are always in RUN/tensorboard",
    "mp_parameters": "--deepspeed zero3",
    "no_cuda": "--use_cpu true",
    "past_index": _ONE_WAY,
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "push_to_hub_model_id": _EXPORT,
    "push_to_hub_organization": _EXPORT,
    "push_to_hub_token": _EXPORT,
    "ray_scope": _ONE_WAY,
    "save_safetensors": "weights are always saved as safetensors",
    "sharded_ddp": "--deepspeed zero2",
    "split_batches": "--global_batch_size",
    "torchdynamo": "--torch_compile_backend",
    "tpu_num_cores": _ONE_WAY,
    "use_ipex": _ONE_WAY,
    "use_legacy_prediction_loop": _ONE_WAY,
    "use_mps_device": _ONE_WAY,
    "warmup_ratio": "--warmup_steps 0.1: below 1 it is a share of all steps",
}
"""Flag that transformers had and tutorials still use -> what to use instead."""

_OFF = ("false", "no", "off", "none", "null", "0", "")


def is_true(value: Any) -> bool:
    """Whether a value as it was written turns a switch on."""
    return str(value).strip().lower() in ("true", "yes", "on", "1")


def refuse_unknown(merged: Merged, known: Collection[str]) -> None:
    """Refuse unknown keys (UserError: the nearest known one, or what replaces a removed one)."""
    for key, (_, origin) in merged.items():
        if key in known:
            continue
        # Tutorials still use these flags, and the nearest known name would mislead.
        if key in REMOVED:
            raise UserError("DSR041", f"transformers has removed {key!r} ({origin}): {REMOVED[key]}")
        hint = nearest(key, known)
        raise UserError("DSR040", f"unknown key {key!r} ({origin}){hint}; `dsrecipes train --help all` lists all")


def refuse_unsuited(merged: Merged) -> None:
    """Refuse a value that would have no effect (UserError: why, and what to use instead)."""
    for key, (value, origin) in merged.items():
        if key in FIXED and not _means(value, FIXED[key][0]):
            raise UserError("DSR043", f"--{key} {_shown(key, value)}: {FIXED[key][1]} ({origin})")


def _shown(key: str, value: Any) -> str:
    """The value for a message, without secrets: a log may be shared."""
    # hub_token is refused as well, and its value is a secret.
    if "token" in key:
        return "..."
    return str(value).lower() if isinstance(value, bool) else str(value)


def _means(value: Any, fixed: Any) -> bool:
    """Whether a value as it was written equals the fixed one."""
    text = str(value).strip().lower()
    # YAML, flags and Python write the same value differently: off, no, false, None or {}.
    if fixed is None or fixed is False:
        return text in _OFF or value == {}
    if fixed is True:
        return is_true(value)
    if isinstance(fixed, str):
        return text == fixed or (fixed == "no" and text in _OFF)
    try:
        return float(text) == fixed
    except ValueError:
        return False


def without_effect(values: Mapping[str, Any], own: Mapping[str, str], zero: bool) -> list[str]:
    """One line for each value that the user gave and that another value makes ineffective.

    Args:
        values: model, data and training values by flag.
        own: key -> origin of the values that the user gave.
        zero: whether DeepSpeed runs.
    """
    reasons = idle_values(values, zero)
    return [
        coded("DSR065", f"{key} has no effect: {reasons[key]} ({origin})") for key, origin in own.items() if key in reasons
    ]


def idle_values(values: Mapping[str, Any], zero: bool) -> dict[str, str]:
    """Flag -> why it has no effect, given the other values.

    Args:
        values: model, data and training values by flag.
        zero: whether DeepSpeed runs.
    """
    reasons = _idle_steps(values) | _idle_schedule(values) | _idle_engine(values, zero) | _idle_tracking(values)
    # Only a hub repository has revisions.
    if user_path(starter_path(str(values["model_name_or_path"]))).is_dir():
        reasons["model_revision"] = "model_name_or_path is a folder"
    if not values["lora_r"]:
        reasons |= dict.fromkeys(("lora_alpha", "lora_dropout", "lora_target_modules"), "lora_r is 0")
    if not values["load_in_4bit"]:
        reasons |= dict.fromkeys(("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"), "load_in_4bit is false")
    return reasons


def _idle_steps(values: Mapping[str, Any]) -> dict[str, str]:
    """Flags on when to evaluate, save and log."""
    reasons: dict[str, str] = {}
    for name in ("eval", "save", "logging"):
        strategy = values[f"{name}_strategy"]
        if strategy != "steps":
            reasons[f"{name}_steps"] = f"{name}_strategy is {strategy}"
    if values["eval_strategy"] == "no":
        reasons["eval_delay"] = "eval_strategy is no"
    if values["save_strategy"] == "no":
        reasons["save_total_limit"] = "save_strategy is no"
    if values["max_steps"] > 0:
        reasons["num_train_epochs"] = f"max_steps {values['max_steps']} sets the length"
    return reasons


def _idle_schedule(values: Mapping[str, Any]) -> dict[str, str]:
    """Flags on the learning rate schedule, the optimizer and the best model."""
    schedule = values["lr_scheduler_type"]
    reasons: dict[str, str] = {}
    needs_best = (
        values["load_best_model_at_end"]
        or values["early_stopping_patience"]
        or values["save_strategy"] == "best"
        or schedule in JUDGED_SCHEDULES
    )
    if not needs_best:
        unused = "nothing needs the best model; see --load_best_model_at_end"
        reasons |= dict.fromkeys(("metric_for_best_model", "greater_is_better"), unused)
    # transformers builds these schedules without a warm-up.
    if schedule in ("constant", *JUDGED_SCHEDULES) and values["warmup_steps"]:
        reasons["warmup_steps"] = f"lr_scheduler_type is {schedule}"
    if schedule in ("constant", "constant_with_warmup"):
        reasons["lr_scheduler_kwargs"] = f"lr_scheduler_type is {schedule}"
    # Only GaLore and APOLLO project the gradients of chosen layers.
    if not str(values["optim"]).startswith(("galore", "apollo")):
        reasons["optim_target_modules"] = f"optim is {values['optim']}"
    return reasons


def _idle_engine(values: Mapping[str, Any], zero: bool) -> dict[str, str]:
    """Flags on compilation, activation checkpointing and DDP."""
    reasons: dict[str, str] = {}
    if not values["activation_checkpointing"]:
        reasons["activation_checkpointing_kwargs"] = "activation_checkpointing is off"
    # Either one alone turns torch_compile on.
    for name in ("backend", "mode"):
        if not values["torch_compile"] and values[f"torch_compile_{name}"] is None:
            reasons[f"torch_compile_{name}"] = "torch_compile is false"
    if zero:
        for name in ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph", "backend"):
            reasons[f"ddp_{name}"] = "DeepSpeed runs, not DDP"
    return reasons


def _idle_tracking(values: Mapping[str, Any]) -> dict[str, str]:
    """Flags that only some experiment trackers read."""
    trackers = set(values["report_to"] or [])
    reasons: dict[str, str] = {}
    # TensorBoard's files are in the run folder and are found by its path.
    if not trackers - {"none", "tensorboard"}:
        reasons["run_name"] = "report_to names no tracker that shows it"
    if not {"trackio", "all"} & trackers:
        names = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
        reasons |= dict.fromkeys(names, "report_to does not name trackio")
    return reasons
