"""Ranks that are killed, stopped or hang end the run within 30 s with a message, and --max_restarts trains on to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.models import Small
from support.rank_pool import Ranks

from dsrecipes.launch.heartbeat import Heartbeat, process_state, read_heartbeat

pytestmark = pytest.mark.ranks

HANGS = """
import os, pathlib, time
from dsrecipes.recipes.gpt2_clm import Gpt2Clm

class Hangs(Gpt2Clm):
    def collator(self, model, tokenizer):
        collate, rows = super().collator(model, tokenizer), []

        def hang_once(batch):
            rows.append(len(batch))
            flag = pathlib.Path(__file__).with_name("hang")
            if len(rows) == 30 and os.environ.get("RANK") == "1" and flag.exists():
                flag.unlink()
                time.sleep(3600)  # the line that the message shows
            return collate(batch)

        return hang_once
"""


@pytest.fixture
def launchers() -> Iterator[list[subprocess.Popen]]:
    """Launchers that are killed after the test; their ranks end with them."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def command(values: dict, *flags: str) -> list[str]:
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "dsrecipes.cli", "train", "--procs", "2", "--use_cpu", "true", *words, *flags]


def until(condition: Callable[[], object], seconds: float, output: Path) -> float:
    """Seconds until the condition holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, output.read_text()[-4000:]
        time.sleep(0.05)
    return time.monotonic() - began


def reaches(run: Path, step: int, other: int = 0) -> Heartbeat | None:
    """Rank 1's record once it has trained to a step, in another process than `other`."""
    record = read_heartbeat(run / "ranks", 1)
    return record if record and record.step > step and record.pid != other else None


def test_hung_and_killed_ranks_are_named_and_the_run_ends_with_the_same_weights(
    two_ranks: Ranks, small: Small, tmp_path: Path, launchers: list
):
    recipe, run, output = tmp_path / "hangs.py", tmp_path / "run", tmp_path / "output.txt"
    recipe.write_text(HANGS)
    # a recipe in a file has no profiles; 20 s are longer than any step here, and keep the test short
    changed = {"max_steps": 50, "save_steps": 10, "eval_steps": 20, "profile": "auto", "hang_timeout": 20}
    values = small.values("gpt2", **changed)["values"]
    two_ranks.run("train", recipe=str(recipe), values={**values, "output_dir": str(tmp_path / "undisturbed")})

    (tmp_path / "hang").touch()
    with output.open("w") as file:
        process = subprocess.Popen(
            command(values, "--recipe", str(recipe), "--output_dir", str(run), "--max_restarts", "2"),
            stdout=file,
            stderr=file,
            cwd=tmp_path,
        )

    launchers.append(process)

    def restarts(number: int) -> bool:
        assert process.poll() is None or number == 3, output.read_text()[-4000:]
        return f"restart   {number} of 2" in output.read_text()

    until(lambda: not (tmp_path / "hang").exists(), 120, output)
    hung = read_heartbeat(run / "ranks", 1)
    assert hung and until(lambda: restarts(1), 60, output) < 30
    lines = output.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("error:"))
    assert f"rank 1 (pid {hung.pid}) has made no progress for 2" in lines[first]
    assert "Last phase: step 15, reading rows. [DSR309]" in lines[first]
    assert f'File "{recipe}", line 14 in hang_once' in lines[first + 2]

    until(lambda: reaches(run, 32, hung.pid), 120, output)
    killed = read_heartbeat(run / "ranks", 1)
    assert killed
    os.kill(killed.pid, signal.SIGKILL)
    assert until(lambda: restarts(2), 60, output) < 30
    assert f"rank 1 (pid {killed.pid}) was killed by SIGKILL at step 3" in output.read_text()
    assert "its memory reached 0." in output.read_text() and "Traceback" not in output.read_text()

    assert process.wait(120) == 0, output.read_text()[-4000:]
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "undisturbed" / weights).read_bytes()
    assert not (run / "ranks").exists()


def test_ranks_end_with_their_launcher_and_a_stopped_one_is_named(small: Small, tmp_path: Path, launchers: list):
    output, runs, processes = tmp_path / "output.txt", [tmp_path / "orphaned", tmp_path / "stopped"], launchers
    values = small.values("gpt2", max_steps=100000, save_steps=100000, eval_steps=100000)["values"]
    with output.open("w") as file:
        for run in runs:
            words = command(values, "--recipe", "gpt2_clm", "--output_dir", str(run))
            processes.append(subprocess.Popen(words, stdout=file, stderr=file, cwd=tmp_path))
    for run in runs:
        until(lambda run=run: reaches(run, 5), 120, output)
    ranks = {run.name: [read_heartbeat(run / "ranks", rank) for rank in (0, 1)] for run in runs}
    processes[0].kill()
    processes[0].wait()
    until(lambda: all(process_state(rank) == "X" for rank in ranks["orphaned"]), 15, output)

    stopped = ranks["stopped"][0]
    os.kill(stopped.pid, signal.SIGSTOP)
    assert processes[1].wait(30) == 75
    assert f"error: rank 0 (pid {stopped.pid}) was stopped (SIGSTOP" in output.read_text()
    assert all(process_state(rank) == "X" for rank in ranks["stopped"])
