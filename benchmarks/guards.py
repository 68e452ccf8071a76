"""What a step pays for going on: recording where the rank stands, agreeing with the others, looking at the loss.

.venv/bin/python benchmarks/guards.py [--steps 12] [--model FOLDER] prints a table for one rank and two, at ZeRO-2.

It measures inside the run: two runs, with and without, differ by more on this kind of machine than what is to be measured.
Waiting for the other rank at the end of a step counts as paid, though without it the rank would wait a moment later.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import inputs

WORK = bench.WORK / "guards"


class Meter:
    """Seconds in a function since the last look."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return measured

    def take(self) -> float:
        """What was measured, from 0 again."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def thread_seconds(name: str) -> float:
    """Processor time of a thread of this process so far."""
    found = [each.native_id for each in threading.enumerate() if each.name == name]
    if not found:
        return 0.0
    fields = Path(f"/proc/self/task/{found[0]}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rank(out: Path, flags: dict[str, Any]) -> None:
    """Train, and write rank 0's seconds a step by part."""
    from transformers import TrainerCallback

    from dsrecipes import load_recipe
    from dsrecipes.launch.watchdog import Watchdog

    record, end = Meter(), Meter()
    Watchdog.enter = record.of(Watchdog.enter)  # type: ignore[method-assign]
    trainer = load_recipe("alpaca_llama_sft", **flags).build_trainer()
    trainer.step_end.check = end.of(trainer.step_end.check)
    rows: list[dict[str, float]] = []

    class Each(TrainerCallback):
        """A row a step, taken when the next one begins."""

        began = watched = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            now, thread = time.perf_counter(), thread_seconds("watch")
            row = {"step": now - self.began, "record": record.take(), "agree": end.take(), "watch": thread - self.watched}
            rows.extend([row] if self.began else [])
            self.began, self.watched = now, thread

    trainer.add_callback(Each())
    trainer.train()
    if int(os.environ["RANK"]) == 0:
        out.write_text(json.dumps(rows))


def main() -> None:
    """Start the ranks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        return rank(Path(asked.rank[0]), json.loads(Path(asked.rank[1]).read_text()))
    WORK.mkdir(parents=True, exist_ok=True)
    model = inputs.make_model(bench.WORK / "model")
    data = inputs.make_rows([bench.DATA / "alpaca_5k.json"], model, bench.WORK / "rows")
    print("| ranks | step, s | recording, ms | agreeing, ms | watching, ms | share of the step |\n|---|---|---|---|---|---|")
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            out, flags = Path(folder, "rows.json"), Path(folder, "flags.json")
            micro = bench.TOKENS // bench.LENGTH // 2 // ranks
            values = bench.our_values(data, asked.steps, Path(folder, "run"), micro=micro)
            flags.write_text(json.dumps(values))
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            command = [sys.executable, *start, __file__, "--rank", str(out), str(flags)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(2 // ranks)}, capture_output=True)
            rows = json.loads(out.read_text())[2:]
        middle = {key: statistics.median(row[key] for row in rows) for key in ("step", "record", "agree")}
        watch = sum(row["watch"] for row in rows) / len(rows)
        share = (middle["record"] + middle["agree"] + watch) / middle["step"]
        cells = [f"{middle['step']:.2f}", *(f"{each * 1e3:.2f}" for each in (middle["record"], middle["agree"], watch))]
        print(f"| {ranks} | {' | '.join(cells)} | {share:.2%} |", flush=True)
    return None


if __name__ == "__main__":
    main()
