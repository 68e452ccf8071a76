"""Read and truncate log.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from dsrecipes.io.disk import write_whole


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log.jsonl; one that is damaged, as by a death in the middle of it, is passed over."""
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            continue
    return lines


def truncate_log(log: Path, step: int, evaluates: bool = False) -> None:
    """Forget log lines of steps after `step`, and its evaluation where that is to be made again."""
    if log.is_file():
        kept = [line for line in read_log(log) if line.get("step", 0) <= step]
        kept = [line for line in kept if not (evaluates and line.get("step") == step and "eval_loss" in line)]
        write_whole(log, "".join(json.dumps(line) + "\n" for line in kept))
