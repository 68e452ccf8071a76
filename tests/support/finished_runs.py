"""Finished runs made without training: a model's folder and the configuration that a run would have left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml


def made_run(folder: Path, recipe: str, model: str, **values: Any) -> Path:
    """A run folder whose tuned model is the model of the folder `model`, as it was before."""
    folder.mkdir(parents=True)
    config = {"recipe": recipe, "profile": "full", "model_name_or_path": model, "dataset": "rows.jsonl", "use_cpu": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | values, sort_keys=False), encoding="utf-8")
    shutil.copytree(model, folder / "model")
    return folder
