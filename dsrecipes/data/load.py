"""Which files and splits does a data set have? A data set is a file, a folder or a name on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dsrecipes.data.decode import SUFFIXES, suffix
from dsrecipes.data.files import FileRows
from dsrecipes.data.json_files import json_splits
from dsrecipes.data.row import Row
from dsrecipes.data.shapes import SPLITS
from dsrecipes.errors import UserError
from dsrecipes.io.paths import starter_path, user_path

_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""Files that the library `datasets` writes next to the data."""


def split_of(path: Path) -> str | None:
    """Return the split in the name of a file or of its folder: train, validation, test, or None."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0].lower()
    # the last word that is a split counts: train_test.csv is a test split
    for word in reversed(re.split(r"[^a-z]+", stem)):
        if word in SPLITS:
            return SPLITS[word]
    return SPLITS.get(path.parent.name.lower())


def data_files(folder: Path) -> list[Path]:
    """Return the data files below a folder, sorted, without hidden ones and other kinds."""
    files = [path for path in folder.rglob("*") if path.is_file() and suffix(path) in SUFFIXES]
    files = [path for path in files if path.name not in _NOT_DATA and not path.name.startswith(".")]
    # sorted, because the order of a directory differs between file systems, and the cache key covers the order of files
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def load_splits(dataset: str, config_name: str | None = None) -> dict[str, Iterable[Row]]:
    """Load the rows of a file, a folder or a hub data set by split (train, validation, test).

    Raises:
        UserError: there is nothing, the kind of file is unknown, no network, a gated or unknown hub name.
    """
    # a local file or folder comes first: a hub name that is also a folder here means the folder
    path = user_path(starter_path(dataset))
    if path.is_file():
        if suffix(path) not in SUFFIXES:
            raise UserError("DSR110", f"{path}: unknown kind of file; these are read: {' '.join(SUFFIXES)}, each also .gz")
        return {name: FileRows((path,), name) for name in json_splits(path) or ["train"]}
    if path.is_dir():
        files = data_files(path)
        if not files:
            raise UserError(
                "DSR111", f"{path}: no data files in this folder; these are read: {' '.join(SUFFIXES)}, each also .gz"
            )
        splits: dict[str, list[Path]] = {}
        for file in files:
            for name in json_splits(file) or [split_of(file.relative_to(path)) or "train"]:
                splits.setdefault(name, []).append(file)
        return {name: FileRows(tuple(paths), name) for name, paths in splits.items()}
    return _load_from_hub(dataset, config_name, path)


def _load_from_hub(dataset: str, config_name: str | None, path: Path) -> dict[str, Iterable[Row]]:
    """Load a data set by its name on the hub (UserError: it looks like a path)."""
    # a misspelled path must not be looked up on the hub, where the message would be about the network
    looks_local = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or suffix(path) in SUFFIXES
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
        raise UserError("DSR112", f"--dataset {dataset}: no such file or folder")
    import datasets  # takes a second, and only hub data sets need it

    try:
        loaded = datasets.load_dataset(dataset, config_name)
    except Exception as error:
        raise _explained(error, dataset) from error
    return {SPLITS[name]: rows for name, rows in loaded.items() if name in SPLITS}


def fetch_csv(dataset: str) -> Path:
    """Download the CSV files of a hub data set, because load_dataset would guess the types of columns file by file.

    Raises:
        UserError: no network, a gated or unknown name.
    """
    from huggingface_hub import snapshot_download

    if dataset.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        raise UserError("DSR112", f"--dataset {dataset}: no such file or folder")
    try:
        return Path(snapshot_download(dataset, repo_type="dataset", allow_patterns="*.csv"))
    except Exception as error:
        raise _explained(error, dataset) from error


def _explained(error: Exception, dataset: str) -> Exception:
    """Turn a failure of the hub into a UserError; other errors stay."""
    from datasets.exceptions import DatasetGenerationError

    from dsrecipes.io.hub import hub_error

    # load_dataset raises ValueError for an unknown configuration as well as for a file that it cannot parse
    message = hub_error(error, dataset, "data set", "--dataset FILE (.json .jsonl .csv .tsv .parquet .txt) or FOLDER")
    if message is None and isinstance(error, (ValueError, DatasetGenerationError)):
        message = (
            f"data set {dataset} cannot be read: {str(error).splitlines()[0]}; see --dataset_config, or download its files"
        )
    return UserError("DSR113", message) if message else error
