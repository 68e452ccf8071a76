"""Training executes a recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dsrecipes
from dsrecipes.errors import EXIT_CODE
from dsrecipes.runs.folder import RunFolder


def verify_apart(folder: RunFolder) -> str | None:
    """Verify a run that just ended in a fresh process on the CPU, for the accelerator is still full.

    Returns:
        What is wrong, or None.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(key, None)
    root = str(Path(dsrecipes.__file__).parents[1])
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "dsrecipes.publish.verify", str(folder.path.absolute())]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == EXIT_CODE:
        return f"the saved model failed its verification. {last.removeprefix('error: ')}"
    return (
        f"the saved model was not verified: the process that loads it ended with exit code {done.returncode} ({last[:200]}); "
        f"`dsrecipes verify {folder.path}` tries again, --verify_model false leaves it out"
    )
