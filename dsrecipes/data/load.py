"""A data set's rows by split: a file, a folder or a name of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dsrecipes.data.files import SUFFIXES, FileRows, Row, json_splits, suffix
from dsrecipes.data.shapes import SPLITS
from dsrecipes.errors import UserError
from dsrecipes.io.paths import starter_path, user_path

_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""What `datasets` writes beside the data."""


def split_of(path: Path) -> str | None:
    """The split that a file's or its folder's name tells: train, validation, test, or None."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0].lower()
    for word in reversed(re.split(r"[^a-z]+", stem)):
        if word in SPLITS:
            return SPLITS[word]
    return SPLITS.get(path.parent.name.lower())


def data_files(folder: Path) -> list[Path]:
    """The data files below a folder, sorted; hidden ones and other kinds are passed over."""
    found = [p for p in folder.rglob("*") if p.is_file() and suffix(p) in SUFFIXES and not p.name.startswith(".")]
    found = [p for p in found if p.name not in _NOT_DATA]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def load_splits(dataset: str, config_name: str | None = None) -> dict[str, Iterable[Row]]:
    """Rows by split name (train, validation, test) of a file, a folder or a hub data set.

    Raises:
        UserError: nothing there, a kind of file that is not read, no network, a gated or unknown hub id.
    """
    path = user_path(starter_path(dataset))
    if path.is_file():
        if suffix(path) not in SUFFIXES:
            raise UserError(f"{path}: unknown kind of file; these are read: {' '.join(SUFFIXES)}, each also .gz")
        return {name: FileRows((path,), name) for name in json_splits(path) or ["train"]}
    if path.is_dir():
        files = data_files(path)
        if not files:
            raise UserError(f"{path}: no data files in this folder; these are read: {' '.join(SUFFIXES)}, each also .gz")
        splits: dict[str, list[Path]] = {}
        for file in files:
            for name in json_splits(file) or [split_of(file.relative_to(path)) or "train"]:
                splits.setdefault(name, []).append(file)
        return {name: FileRows(tuple(paths), name) for name, paths in splits.items()}
    looks_local = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or suffix(path) in SUFFIXES
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
        raise UserError(f"--dataset {dataset}: no such file or folder")
    return _hub(dataset, config_name)


def _hub(dataset: str, config_name: str | None) -> dict[str, Iterable[Row]]:
    import datasets

    try:
        loaded = datasets.load_dataset(dataset, config_name)
    except Exception as error:
        raise _explained(error, dataset) from error
    return {SPLITS[name]: rows for name, rows in loaded.items() if name in SPLITS}


def fetch_csv(dataset: str) -> Path:
    """The folder of a hub data set's CSV files, as they are: a column's type is not guessed file by file.

    Raises:
        UserError: no network, a gated or unknown name.
    """
    from huggingface_hub import snapshot_download

    if dataset.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        raise UserError(f"--dataset {dataset}: no such file or folder")
    try:
        return Path(snapshot_download(dataset, repo_type="dataset", allow_patterns="*.csv"))
    except Exception as error:
        raise _explained(error, dataset) from error


def _explained(error: Exception, dataset: str) -> Exception:
    from datasets.exceptions import DatasetGenerationError

    from dsrecipes.io.hub import hub_error

    message = hub_error(error, dataset, "data set", "--dataset FILE (.json .jsonl .csv .tsv .parquet .txt) or FOLDER")
    if message is None and isinstance(error, (ValueError, DatasetGenerationError)):
        message = (
            f"data set {dataset} cannot be read: {str(error).splitlines()[0]}; see --dataset_config, or download its files"
        )
    return UserError(message) if message else error
