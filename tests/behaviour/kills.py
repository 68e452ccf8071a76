"""Kill real two-rank runs at random moments, resume with the same command, and compare the results. Prints a table.

PYTHONPATH=tests .venv/bin/python tests/behaviour/kills.py --kills 60 --seed 0

A chain is one run that is killed several times, each time at a later step; the same command resumes it. It must end with
the weights and the losses of a run that was never killed, bit for bit. Victims: one rank, all ranks,
the launcher, by SIGKILL. Moments: at the start, in a step, in a save, in an evaluation; where in each is drawn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file
from support.models import Small

from dsrecipes.launch.heartbeat import PHASES, read_heartbeat

VICTIMS = ("one rank", "all ranks", "launcher")
MOMENTS = ("start", "step", "save", "evaluation")
PHASE_OF = {"save": "saving", "evaluation": "evaluating"}
STEPS, CHAIN, PATIENCE = 60, 6, 120
FLAGS = {
    "max_steps": STEPS, "save_steps": 4, "eval_steps": 5, "save_total_limit": 3, "disable_tqdm": True, "use_cpu": True,
    "deepspeed": "zero2", "report_to": "none", "hang_timeout": 25,
}  # fmt: skip


def command(small: Small, folder: Path, name: str) -> list[str]:
    """The command of a run, the same for each start."""
    case = small.values(name, **FLAGS, output_dir=str(folder), resume_from_checkpoint="auto")
    flags = [word for key, value in case["values"].items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "dsrecipes.cli", "train", case["recipe"], "--procs", "2", *flags]


def ranks_of(launcher: int) -> list[int]:
    """Pids of a launcher's ranks."""
    output = subprocess.run(["pgrep", "-P", str(launcher), "-f", "dsrecipes.run"], capture_output=True, text=True).stdout
    return [int(pid) for pid in output.split()]


def gone(pids: list[int]) -> bool:
    """Whether none of the processes is left."""
    return not any(
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
        for pid in pids
    )


class Start:
    """One start of the command."""

    def __init__(self, words: list[str], folder: Path, log: Path) -> None:
        self.folder, self.began = folder, time.monotonic()
        env = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
        self.process = subprocess.Popen(
            words, stdout=log.open("ab"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env
        )

    def await_moment(self, moment: str, after: int, draw: random.Random) -> bool:
        """Wait until rank 0 is in a phase after some step, and a random time more; False where the run ended first."""
        if moment == "start":
            time.sleep(draw.uniform(0.5, 9))
            return self.process.poll() is None
        while self.process.poll() is None:
            record = read_heartbeat(self.folder / "ranks", 0)
            if record and record.step >= after and (moment == "step" or PHASES[record.phase] == PHASE_OF[moment]):
                time.sleep(draw.uniform(0, 0.3 if moment == "step" else 0.08))
                return self.process.poll() is None
            # a save of a small model takes some tens of milliseconds
            time.sleep(0.001)
        return False

    def kill(self, victim: str, draw: random.Random) -> float:
        """SIGKILL the victim; seconds until no process is left."""
        ranks = ranks_of(self.process.pid)
        began = time.monotonic()
        # before the launcher has started ranks, there is only the launcher to kill
        if victim == "launcher" or not ranks:
            victims = [self.process.pid]
        elif victim == "all ranks":
            victims = ranks
        else:
            victims = [draw.choice(ranks)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        while time.monotonic() - began < PATIENCE:
            self.process.poll()
            if self.process.returncode is not None and gone(ranks):
                return time.monotonic() - began
            time.sleep(0.05)
        raise SystemExit(f"processes of {self.folder} are left {PATIENCE} s after {victim} was killed")

    def wait(self) -> int:
        """The exit code of a start that is left alone."""
        return self.process.wait(600)


def end_of(folder: Path) -> tuple[dict, list]:
    """The final weights, and the figures of log.jsonl."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
    return load_file(folder / "model" / "model.safetensors"), [
        {key: line[key] for key in keys if key in line} for line in lines
    ]


def chain(
    number: int, plan: list[tuple[str, str]], small: Small, name: str, folder: Path, draw: random.Random
) -> list[dict]:
    """Kill a run again and again, then let it end; a row for each kill."""
    run, log, rows = folder / f"chain-{number}", folder / f"chain-{number}.log", []
    for index, (victim, moment) in enumerate(plan):
        start = Start(command(small, run, name), run, log)
        # each kill comes at a later step than the one before, so that a chain ends
        after = int(STEPS * (index + 0.2) / (len(plan) + 1)) + draw.randrange(3)
        hit = start.await_moment(moment, after, draw)
        record = read_heartbeat(run / "ranks", 0)
        where = record.position() if record and record.pid in ranks_of(start.process.pid) else "starting"
        rows.append(
            {
                "chain": number,
                "victim": victim,
                "moment": moment,
                "where": where,
                "seconds": start.kill(victim, draw) if hit else None,
            }
        )
    code = Start(command(small, run, name), run, log).wait()
    for row in rows:
        row["end"] = code
    return rows


def main() -> int:
    """Print a row a kill, and whether each chain ended as the run that was never killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="gpt2", help="which small model of tests/support/models.py")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folder, draw = Path(tempfile.mkdtemp(prefix="kills-")), random.Random(options.seed)
    (folder / "small").mkdir()
    small = Small(folder / "small")
    if Start(command(small, folder / "whole", options.name), folder / "whole", folder / "whole.log").wait():
        raise SystemExit((folder / "whole.log").read_text())
    weights, figures = end_of(folder / "whole")
    pairs = list(itertools.islice(itertools.cycle(itertools.product(VICTIMS, MOMENTS)), options.kills))
    draw.shuffle(pairs)
    print(
        "| chain | victim | moment | rank 0 stood at | seconds until all were gone | end of the chain |\n|---|---|---|---|---|---|"
    )
    failed = 0
    for number, at in enumerate(range(0, len(pairs), CHAIN)):
        rows = chain(number, pairs[at : at + CHAIN], small, options.name, folder, draw)
        ours, log = end_of(folder / f"chain-{number}") if not rows[0]["end"] else ({}, [])
        same = ours.keys() == weights.keys() and all(ours[key].equal(weights[key]) for key in weights) and log == figures
        failed += not same
        for row in rows:
            seconds = "not killed: the run had ended" if row["seconds"] is None else f"{row['seconds']:.1f}"
            print(
                f"| {number} | {row['victim']} | {row['moment']} | {row['where']} | {seconds} | {'equal' if same else 'DIFFERENT, code ' + str(row['end'])} |",
                flush=True,
            )
    print(
        f"\n{len(pairs)} kills in {-(-len(pairs) // CHAIN)} chains: {failed} ended otherwise than the run that was never killed"
    )
    if not failed:
        shutil.rmtree(folder)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
