"""Which settings and data can be streamed?

All others are refused before a file is read. A stream knows neither the number of rows nor what comes
later in the file, so whatever needs either cannot work with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsrecipes.data.files import FileRows
from dsrecipes.data.renamed import RenamedRows
from dsrecipes.errors import UserError, coded
from dsrecipes.io.paths import starter_path, user_path

if TYPE_CHECKING:
    from dsrecipes.config.schema import Config, DataConfig


def check_streaming(config: Config, auto_class: str) -> list[str]:
    """Refuse settings of the user's that a stream cannot honour, and turn off those that are only defaults of a recipe.

    Args:
        config: of the run; validation_split may be changed.
        auto_class: of the recipe.

    Returns:
        Notes on settings without effect.

    Raises:
        UserError: names the flag.
    """
    data, train = config.data, config.train
    _check_data(data, auto_class)
    if train["max_steps"] <= 0:
        raise UserError(
            "DSR153",
            "--streaming true: the number of steps of an epoch is not known before the file is read, and the schedule of the "
            "learning rate needs the number of steps: give --max_steps N instead of --num_train_epochs. If the file ends "
            "earlier, it is read again in another order",
        )
    if data.validation_split:
        if "validation_split" in config.own:
            raise UserError(
                "DSR154",
                "--validation_split: streamed rows cannot be held out, because equal rows could be anywhere in the file: give "
                "--eval_dataset FILE, or --streaming false",
            )
        data.validation_split = 0.0
    # for Trainer a streamed run is one epoch, so such a run would save and evaluate only at its end
    for name in ("eval", "save", "logging"):
        if train[f"{name}_strategy"] == "epoch":
            raise UserError(
                "DSR155",
                f"--{name}_strategy epoch: with --streaming true the steps of an epoch are not known; give "
                f"--{name}_strategy steps --{name}_steps N",
            )
    if train["dataloader_num_workers"] and "dataloader_num_workers" in config.own:
        return [coded("DSR159", "dataloader_num_workers has no effect: with streaming, a thread of each rank reads ahead")]
    return []


def _check_data(data: DataConfig, auto_class: str) -> None:
    """Refuse what cannot be read piece by piece."""
    if data.is_mixture:
        raise UserError(
            "DSR150",
            "--streaming true: --dataset and --eval_dataset take one data set each, without settings of its own: put the "
            "files into one folder, or give --streaming false",
        )
    if not auto_class.endswith("ForCausalLM"):
        raise UserError(
            "DSR151",
            "--streaming true: only recipes that train causal language models stream; the head of this one must know all "
            "labels in advance. Give --streaming false",
        )
    if not user_path(starter_path(str(data.dataset))).exists():
        raise UserError(
            "DSR152",
            f"--streaming true reads files and folders, and --dataset {data.dataset} is neither: download first (hf download "
            f"{data.dataset} --repo-type dataset --local-dir DIR), then give --dataset DIR",
        )


def stream_files(rows: Any, dataset: str | None) -> FileRows | RenamedRows:
    """Return the files to stream, perhaps with --columns.

    Raises:
        UserError: the recipe reads the data in another way.
    """
    if not isinstance(rows.rows if isinstance(rows, RenamedRows) else rows, FileRows):
        raise UserError(
            "DSR156",
            f"--streaming true: this recipe does not read --dataset {dataset} file by file; give --streaming false",
        )
    return rows
