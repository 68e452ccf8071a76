"""Which private methods of transformers.Trainer does RecipeTrainer override or call, and what do they look like?

A release of transformers may change any of them without notice. tests/train/test_private_surface.py compares them with the
installed release, so that a change is a failed test with the method's name instead of a run that misbehaves.
"""

from __future__ import annotations

from dataclasses import dataclass

READ_FROM = "5.23.0"
"""The release of transformers whose Trainer was read; setup.cfg bounds the releases that are allowed."""


@dataclass(frozen=True)
class PrivateMethod:
    """A private method of Trainer that a run depends on."""

    name: str
    parameters: str
    """Its parameters with their defaults, without annotations."""
    reason: str


OVERRIDES = (
    PrivateMethod(
        "_prepare_for_training",
        "(self, max_steps, train_dataloader, resume_from_checkpoint)",
        "No callback runs between the start of the engine and loading, where a checkpoint is resharded instead.",
    ),
    PrivateMethod(
        "_load_from_checkpoint",
        "(self, resume_from_checkpoint, model=None)",
        "Weights of a checkpoint that is resharded afterwards must not be loaded; ZeRO-3 may have written none.",
    ),
    PrivateMethod(
        "_load_best_model",
        "(self)",
        "The files of the best checkpoint are checked first, and it may have to be resharded.",
    ),
    PrivateMethod(
        "_run_epoch",
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, "
        "start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
        "Trainer takes one step too many when it resumes at the end of a run.",
    ),
    PrivateMethod(
        "_prepare_inputs",
        "(self, inputs)",
        "Trainer rounds numbers to learn (labels of a regression, weights) to the engine's dtype.",
    ),
    PrivateMethod(
        "_maybe_log_save_evaluate",
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None)",
        "All ranks must agree before a step is logged, evaluated and saved; callbacks do not get the gradient norm.",
    ),
    PrivateMethod(
        "_determine_best_metric",
        "(self, metrics, trial)",
        "An evaluation that failed has no figures, and a wrong name is the user's mistake, not a KeyError.",
    ),
    PrivateMethod(
        "_save_checkpoint",
        "(self, model, trial)",
        "Checkpoints are staged, sealed and renamed, so that an interrupted save leaves none.",
    ),
    PrivateMethod(
        "_save",
        "(self, output_dir=None, state_dict=None)",
        "A saved model has no pickle, and tied weights are written once at every ZeRO stage.",
    ),
)
"""Overridden by RecipeTrainer."""

CALLS = (
    PrivateMethod(
        "_get_num_items_in_batch",
        "(self, batch_samples, device)",
        "Counts the labels of a step over all ranks.",
    ),
    PrivateMethod(
        "_evaluate",
        "(self, trial, ignore_keys_for_eval, skip_scheduler=False)",
        "Makes up for an evaluation that was due when the checkpoint was saved, with the schedule's step that follows it.",
    ),
)
"""Called, not overridden."""

ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")
"""State that Trainer keeps between two steps and does not save; checkpoints hold it in progress.json."""
