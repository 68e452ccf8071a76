"""What does a run folder say about its run? Read without torch, also while the run is training or after a crash."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from dsrecipes.errors import UserError
from dsrecipes.io.text import read_yaml
from dsrecipes.runs.folder import RunFolder, find_run
from dsrecipes.runs.log import read_log

Json = Any


def read_json(path: Path) -> Json:
    """Read a JSON file, or a .jsonl file as a list of its lines, without the half line that a killed run leaves.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_log(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("DSR560", f"{path} cannot be read: {error}") from error


@dataclass
class RecordedRun:
    """The files of a run folder as plain Python. What is missing or damaged is empty; `notes` lists what is damaged."""

    folder: RunFolder
    name: str
    notes: list[str] = field(default_factory=list)

    def _read(self, path: Path) -> dict[str, Json]:
        if not path.is_file():
            return {}
        try:
            value = read_json(path)
        except UserError as error:
            self.notes.append(error.message)
            return {}
        return value if isinstance(value, dict) else {}

    @cached_property
    def config(self) -> dict[str, Json]:
        """config.yaml."""
        return read_yaml(self.folder.config)

    @cached_property
    def environment(self) -> dict[str, Json]:
        """environment.json."""
        return self._read(self.folder.environment)

    @cached_property
    def metrics(self) -> dict[str, Json]:
        """metrics.json; empty until a run is finished."""
        return self._read(self.folder.metrics)

    @cached_property
    def splits(self) -> dict[str, dict[str, Json]]:
        """data.json: split -> what was read, kept and dropped of its rows."""
        return {name: facts for name, facts in self._read(self.folder.data).items() if isinstance(facts, dict)}

    @cached_property
    def verified(self) -> dict[str, Json]:
        """VERIFIED.json, in the run folder or next to the model."""
        return self._read(self.folder.verified) or self._read(self.folder.model / self.folder.verified.name)

    @cached_property
    def log(self) -> list[dict[str, Json]]:
        """The complete lines of log.jsonl."""
        # log.jsonl may hold anything after a crash or an edit; only lines with a step can be drawn.
        lines = read_log(self.folder.log)
        return [line for line in lines if isinstance(line, dict) and is_number(line.get("step"))]

    @cached_property
    def others(self) -> list[Path]:
        """Other JSON files in the run folder: samples, comparisons, what the recipe wrote."""
        folder = self.folder
        known = (folder.ds_config, folder.environment, folder.data, folder.metrics, folder.verified, folder.log)
        paths = (path for path in folder.path.iterdir() if path.suffix in (".json", ".jsonl"))
        return sorted(path for path in paths if path.is_file() and path not in known)

    @property
    def origins(self) -> dict[str, Json]:
        """Where each value of config.yaml came from when the run started, as `dsrecipes show` calls it."""
        origins = self.environment.get("origins")
        return origins if isinstance(origins, dict) else {}

    def dropped(self, split: str) -> list[tuple[str, Json]]:
        """(reason, rows) of what was dropped from a split."""
        reasons = self.splits[split].get("dropped")
        return list(reasons.items()) if isinstance(reasons, dict) else []

    def last(self, key: str) -> float | None:
        """The last finite value of a key of log.jsonl."""
        return next((line[key] for line in reversed(self.log) if is_number(line.get(key))), None)


def as_mapping(value: Json) -> dict[str, Json]:
    """The value where it is an object, else an empty one, since files of a run may be damaged."""
    return value if isinstance(value, dict) else {}


def is_number(value: Json) -> TypeGuard[float]:
    """Whether a value is a finite number; true and false are not."""
    # Also false for NaN and infinity, which a chart cannot draw. bool is a subclass of int.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def open_recorded(names: list[str | Path]) -> list[RecordedRun]:
    """Open run folders, each with a short name: the folder's name, or its path where two have the same name.

    Raises:
        UserError: not a run folder, or one is given twice.
    """
    folders = [find_run(str(name), ended=False) for name in names]
    paths = [folder.path.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError("DSR561", f"{path}: this run is given twice")
    # Run folders are named by time, so two recipes may have folders of one name.
    short = [path.name for path in paths]
    return [
        RecordedRun(folder, path.name if short.count(path.name) == 1 else str(path))
        for folder, path in zip(folders, paths, strict=True)
    ]
