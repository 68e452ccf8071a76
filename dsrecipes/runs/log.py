"""How log.jsonl is read, and truncated when a run resumes from an earlier step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsrecipes.io.disk import write_whole


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's log.jsonl; damaged ones are skipped, since a killed run may leave half a line."""
    lines = []
    # as bytes: a line that is cut inside a character must not spoil the others
    for text in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            continue
    return lines


def truncate_log(log: Path, step: int, evaluates: bool = False) -> None:
    """Remove lines of steps after `step`.

    Args:
        evaluates: whether the evaluation of `step` will be repeated, so that its line is removed too.
    """
    if not log.is_file():
        return
    lines = [line for line in read_log(log) if line.get("step", 0) <= step]
    if evaluates:
        lines = [line for line in lines if line.get("step") != step or "eval_loss" not in line]
    # replaced as a whole, so that a kill here loses no line
    write_whole(log, "".join(json.dumps(line) + "\n" for line in lines))
