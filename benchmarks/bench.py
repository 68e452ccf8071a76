"""Ours beside naive loops, TRL and LLaMA-Factory: same rows, model, optimizer, threads and useful tokens a step.

    make bench-envs && make bench                                  everything, three rounds
    .venv/bin/python benchmarks/bench.py step --only ours trl-best --rounds 1 --steps 4
    .venv/bin/python benchmarks/bench.py zero                      also: prepare, startup, vocabulary

Tables and a picture are written to benchmarks/results/. What is measured and how: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inputs
import report
from meter import LENGTH, RATE, TOKENS, versions

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".bench"
DATA = HERE.parent.parent / "shared" / "data" / "alpaca"
PYTHONS = {"trl": WORK / "trl/bin/python", "lf": WORK / "lf/bin/python", "": Path(sys.executable)}
SCRIPTS = {"trl": "trl_sft.py", "lf": "llama_factory.py", "": "naive.py"}
NAMES = [
    "ours", "ours-bf16", "packed-by-example", "packed-selected", "packed", "pad-to-longest", "pad-to-max",
    "trl-plain", "trl-packing", "trl-best", "lf-default", "lf-neat-packing",
]  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {"ours-bf16": {"bf16": True}}
"""Flags of a contestant that is another one with something changed."""
QUICK = ["ours", "packed-selected", "pad-to-longest"]
STARTS = {
    "ours": {}, "ours-no-deepspeed": {"deepspeed": "none"}, "trl-best": {},
    "lf-neat-packing": {"tokenized_path": str(WORK / "cache" / "lf-tokenized")},
}  # fmt: skip
PREPARES: dict[str, tuple[str, int | None]] = {
    "ours": ("ours", None), "trl": ("trl-packing", None), "trl, 2 workers": ("trl-packing", 2),
    "llama-factory": ("lf-neat-packing", None), "llama-factory, 2 workers": ("lf-neat-packing", 2),
}  # fmt: skip
"""What is shown: the contestant, and how many processes prepare its data."""
TIMEOUT = 3600
Json = dict[str, Any]


# ---- processes ----


def family(name: str) -> str:
    """ "trl", "lf" or "" for our own environment."""
    return name.split("-")[0] if name.split("-")[0] in ("trl", "lf") else ""


def present(names: list[str]) -> list[str]:
    """The contestants whose environment is there; the others are named."""
    for name in names:
        if not PYTHONS[family(name)].is_file():
            print(f"{name}: skipped, {PYTHONS[family(name)].relative_to(HERE.parent)} is not there: make bench-envs")
    return [name for name in names if PYTHONS[family(name)].is_file()]


def run(command: list[str], out: Path, env: dict[str, str], watch: Callable[[int], None] | None = None) -> float:
    """Run a command in an empty folder `out`, its words in out/console.txt; returns the unix time of its start."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    own = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(WORK / "cache" / "datasets")}
    began = time.time()
    with (out / "console.txt").open("w") as console:
        process = subprocess.Popen(
            command, env=os.environ | own | {"DSRECIPES_CACHE": str(WORK / "cache" / "ours")} | env, cwd=HERE.parent,
            stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.time() < began + TIMEOUT:
                if watch:
                    watch(process.pid)
                time.sleep(0.25)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.wait():
        tail = (out / "console.txt").read_text().splitlines()[-15:]
        sys.exit("\n".join([f"failed: {' '.join(command)}", *tail, f"all of it: {out}/console.txt"]))
    return began


def flags(values: Json) -> list[str]:
    """A dict as command-line flags."""
    return [
        word
        for key, value in values.items()
        for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def our_values(data: Path, steps: int, out: Path, micro: int = 4, model: Path = WORK / "model") -> Json:
    """The flags of ours."""
    return {
        "profile": "full", "use_cpu": True, "model_name_or_path": str(model), "dataset": str(data / "alpaca.json"),
        "skip_bad_rows": True, "max_length": LENGTH, "validation_split": 0.0, "global_batch_size": TOKENS // LENGTH,
        "per_device_train_batch_size": micro, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": 0.0, "activation_checkpointing": False, "save_strategy": "no", "eval_strategy": "no",
        "logging_steps": 1, "max_steps": steps, "output_dir": str(out), "overwrite_output_dir": True, "deepspeed": "zero2",
        "seed": 42, "verify_model": False,
    }  # fmt: skip


def our_tokens(data: Path, steps: int) -> list[int]:
    """Useful tokens of our steps, counted apart from the library's log."""
    import numpy as np

    from dsrecipes.data.pack import pack
    from dsrecipes.data.sampler import StepSampler

    rows = np.array([len(row["input_ids"]) for row in inputs.read_tokens(data / "tokens.jsonl")])
    lengths = np.array([rows[each].sum() for each in pack(rows, LENGTH)])
    return lengths[StepSampler(lengths, TOKENS // LENGTH, seed=42).order()[:steps]].sum(axis=1).tolist()


def our_result(out: Path, data: Path, values: Json) -> Json:
    """A run folder as the other contestants write their result."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    tokens = our_tokens(data, len(lines))
    first = tokens[0] / lines[0]["tokens_per_second"]
    seconds = [first, *(after["time"] - before["time"] for before, after in zip(lines, lines[1:], strict=False))]
    steps = [
        {"seconds": spent, "tokens": count, "loss": line["loss"]}
        for spent, count, line in zip(seconds, tokens, lines, strict=True)
    ]
    return {
        "name": "ours",
        "config": values,
        "steps": steps,
        "first_step_at": lines[0]["time"],
        "versions": versions(),
        "peak_gb": lines[-1]["peak_memory_gb"],
        "seen": [],
    }


def contestant(
    name: str,
    data: Path,
    steps: int,
    out: Path,
    changes: Json | None = None,
    save: bool = True,
    model: Path = WORK / "model",
) -> Json:
    """Run one, and return its result with the time its process started."""
    if name.startswith("ours"):
        values = our_values(data, steps, out / "run", model=model) | CHANGES.get(name, {}) | (changes or {})
        command = [sys.executable, "-m", "dsrecipes.run", "--recipe", "alpaca_llama_sft", *flags(values)]
        began = run(command, out, {})
        return our_result(out / "run", data, values) | {"began": began, "model": str(out / "run" / "model")}
    rows = json.loads((data / "info.json").read_text())["rows_per_step"]
    command = [
        str(PYTHONS[family(name)]), str(HERE / SCRIPTS[family(name)]), *([] if save else ["--no_save"]),
        *flags({"name": name, "model": model, "data": data, "out": out, "steps": steps, "rows_per_step": rows}),
        "--set", json.dumps(changes or {}),
    ]  # fmt: skip
    began = run(command, out, {})
    return json.loads((out / "result.json").read_text()) | {"began": began, "model": str(out / "model")}


# ---- the parts ----


def step_part(args: argparse.Namespace, data: Path) -> Json:
    """Throughput: every contestant in turn, round after round; the first round also checks the losses."""
    names = present(args.only or (QUICK if args.quick else NAMES))
    initial = inputs.held_out_loss(WORK / "model", data, args.held_out)
    found: Json = {name: {"rates": [], "tokens": []} for name in names}
    limits = []
    for number in range(args.rounds):
        limits.append(inputs.arithmetic_limit(data))
        for name in names:
            result = contestant(name, data, args.steps, WORK / "runs" / name)
            measured, own = result["steps"][args.warmup :], found[name]
            own["rates"].append(sum(step["tokens"] for step in measured) / sum(step["seconds"] for step in measured))
            own["tokens"].append(statistics.mean(step["tokens"] for step in measured))
            print(f"round {number + 1}  {name:18} {own['rates'][-1]:7.1f} useful tokens/s", flush=True)
            if number == 0:
                own |= {"config": result["config"], "versions": result["versions"]}
                own |= {"losses": [step["loss"] for step in result["steps"]]}
                own["held_out"] = inputs.held_out_loss(Path(result["model"]), data, args.held_out)
                own["rows_equal"] = inputs.matching(result["seen"], data)
        if number == 0:
            check(found, initial)
    for own in found.values():
        if "ours" in found:
            pairs = zip(found["ours"]["rates"], own["rates"], strict=True)
            own["ratio"] = statistics.median(mine / other for mine, other in pairs)
    return {
        "initial_held_out": initial, "steps": args.steps, "warmup": args.warmup, "limits": limits, "contestants": found
    }  # fmt: skip


def check(found: Json, initial: float) -> None:
    """Write into each contestant's "faults" where it did not train the same.

    The first step's loss: within 0.1 of ln(vocabulary) and 0.05 of the median; the held-out loss after the last step:
    within 5% of the median's drop; useful tokens a step: within 5% of 2,048; first rows: those of ours.
    """
    import math

    first = statistics.median(own["losses"][0] for own in found.values())
    last = statistics.median(own["held_out"] for own in found.values())
    for name, own in found.items():
        loss, tokens = own["losses"][0], own["tokens"][0]
        tests = {
            f"first loss {loss:.3f}, ln(vocabulary) {math.log(49152):.3f}": abs(loss - math.log(49152)) <= 0.1,
            f"first loss {loss:.3f}, the median {first:.3f}": abs(loss - first) <= 0.05,
            f"different result: held-out loss {own['held_out']:.3f}, the median {last:.3f}": abs(own["held_out"] - last)
            <= 0.05 * (initial - last),
            f"{tokens:.0f} tokens a step": abs(tokens - TOKENS) <= 0.05 * TOKENS,
            f"{own['rows_equal'] or 0:.0%} of its first rows are those of ours": own["rows_equal"] in (None, 1.0),
        }
        own["faults"] = [fault for fault, passed in tests.items() if not passed]
        print(f"check    {name:18} loss {loss:.3f} -> held out {own['held_out']:.3f}  {'; '.join(own['faults']) or 'ok'}")


def zero_part(args: argparse.Namespace, data: Path) -> Json:
    """ZeRO 0 to 3 on 1 and 2 ranks: time of a step, and what a rank holds and sends."""
    table = {}
    for ranks in (1, 2):
        for stage in range(4):
            out = WORK / "zero" / f"{stage}-{ranks}"
            values = our_values(data, args.steps, out / "run", micro=TOKENS // LENGTH // ranks) | {
                "deepspeed": f"zero{stage}"
            }
            env = {"OMP_NUM_THREADS": str(2 // ranks)}
            command = [
                sys.executable,
                "-m",
                "dsrecipes.cli",
                "train",
                "alpaca_llama_sft",
                "--procs",
                str(ranks),
                *flags(values),
            ]
            run(command, out, env)
            times = [json.loads(line)["time"] for line in (out / "run" / "log.jsonl").read_text().splitlines()]
            seconds = [after - before for before, after in zip(times, times[1:], strict=False)][args.warmup - 1 :]
            table[f"{stage}-{ranks}"] = {"seconds": statistics.median(seconds), **count_bytes(values, stage, ranks, env)}
            print(f"zero {stage}, {ranks} ranks  {statistics.median(seconds):.2f} s a step", flush=True)
    return table


def count_bytes(values: Json, stage: int, ranks: int, env: dict[str, str]) -> Json:
    """What zero.py counts in three steps, with DeepSpeed's log of communication on."""
    out, setting = WORK / "zero" / f"count-{stage}-{ranks}", WORK / "zero" / f"{stage}-{ranks}.json"
    engine = json.loads((HERE.parent / "ds_configs" / f"zero{stage}.json").read_text())
    engine["comms_logger"] = {"enabled": True, "prof_all": True, "verbose": False, "debug": False}
    setting.write_text(json.dumps(engine))
    flag_file = WORK / "zero" / f"flags-{stage}-{ranks}.json"
    flag_file.write_text(json.dumps(values | {"deepspeed": str(setting), "max_steps": 3, "output_dir": str(out / "run")}))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    run([sys.executable, *start, str(HERE / "zero.py"), str(out / "count.json"), str(flag_file)], out, env)
    return json.loads((out / "count.json").read_text())


def prepare_part(args: argparse.Namespace, data: Path) -> Json:
    """Preparation of all rows, nothing cached: seconds, and the most memory that the processes held together."""
    whole = inputs.make_rows([*args.prepare_rows], WORK / "model", WORK / "rows", all_rows=True)
    found: Json = {}
    for number in range(args.rounds):
        for title, (name, workers) in PREPARES.items():
            if number == 0 and not present([name]):
                continue
            if not PYTHONS[family(name)].is_file():
                continue
            out, scratch = WORK / "prepare" / name, WORK / "prepare-cache"
            shutil.rmtree(scratch, ignore_errors=True)
            script = "prepare_ours.py" if name == "ours" else SCRIPTS[family(name)]
            values = {"name": name, "model": WORK / "model", "data": whole, "out": out}
            if workers:
                values["workers"] = workers
            peak = [0]
            command = [str(PYTHONS[family(name)]), str(HERE / script), "--prepare", *flags(values)]
            run(
                command, out, {"HF_DATASETS_CACHE": str(scratch), "DSRECIPES_CACHE": str(scratch)},
                watch=lambda pid, peak=peak: peak.append(max(peak.pop(), memory(pid))),
            )  # fmt: skip
            own = found.setdefault(title, {"seconds": [], "bytes": []})
            result = json.loads((out / "prepared.json").read_text())
            own["seconds"].append(result["seconds"])
            own["bytes"].append(peak[0])
            own |= {"rows": result["rows"], "sequences": result["sequences"]}
            print(f"round {number + 1}  prepare, {title}: {result['seconds']:.1f} s, {peak[0] / 1e9:.2f} GB", flush=True)
    return found


def memory(pid: int) -> int:
    """Bytes resident in a process and all below it, shared pages counted once (Linux's proportional set size)."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for thread in (folder / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except OSError:
            continue
    return total


def startup_part(args: argparse.Namespace, data: Path) -> Json:
    """Seconds from the command to the end of its first optimizer step; a first, uncounted run fills the caches."""
    names = present([name for name in STARTS if name in (args.only or STARTS)])
    found: Json = {name: [] for name in names}
    for number in range(args.rounds + 1):
        for name in names:
            changes = dict(STARTS[name])
            result = contestant(name, data, 1, WORK / "startup" / name, changes, save=False)
            if number:
                found[name].append(result["first_step_at"] - result["began"])
                print(f"round {number}  start-up, {name}: {found[name][-1]:.1f} s", flush=True)
    return found


def vocabulary_part(args: argparse.Namespace, data: Path) -> Json:
    """Most memory resident in two steps with a vocabulary of 128,256 tokens (Llama 3's): all logits, and selected ones."""
    model = inputs.make_model(WORK / "model-128k", 128256)
    found = {}
    for name in ("packed", "packed-selected", "ours"):
        found[name] = contestant(name, data, 2, WORK / "vocabulary" / name, save=False, model=model)["peak_gb"]
        print(f"vocabulary 128,256, {name}: {found[name]:.2f} GB", flush=True)
    return found


# ---- the command ----


def machine() -> Json:
    """The processor, its cores, the memory and the system."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory": size, "system": platform.platform(), "load": os.getloadavg()[0]}


PARTS = {
    "step": step_part,
    "zero": zero_part,
    "prepare": prepare_part,
    "startup": startup_part,
    "vocabulary": vocabulary_part,
}


def main() -> None:
    """Run the parts asked for, and write what they found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=2, help="of these, steps that are not timed")
    parser.add_argument("--rows", type=Path, default=DATA / "alpaca_5k.json", help="rows in Alpaca's form")
    parser.add_argument(
        "--prepare_rows", type=Path, nargs="+", default=[DATA / "alpaca_5k.json", DATA / "alpaca_45k.json.gz"],
        help="rows that `prepare` prepares",
    )  # fmt: skip
    parser.add_argument("--held_out", type=int, default=inputs.HELD_OUT, help="rows that the final loss is taken on")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"contestants: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; one round of two steps, in .bench/quick")
    parser.add_argument("--out", type=Path, help="folder of the tables; default benchmarks/results")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.quick:
        args.parts, args.rounds, args.steps, args.warmup, args.held_out = ["step"], 1, 2, 1, 16
    out = args.out or (WORK / "quick" if args.quick else HERE / "results")
    out.mkdir(parents=True, exist_ok=True)
    data = inputs.make_rows([args.rows], inputs.make_model(WORK / "model"), WORK / "rows")
    today = datetime.date.today().isoformat()
    file = out / f"{today}-{platform.node()}.json"
    result = json.loads(file.read_text()) if file.is_file() and not args.quick else {}
    result |= {"date": today, "host": platform.node(), "machine": machine(), "versions": versions()}
    result["inputs"] = json.loads((data / "info.json").read_text())
    for part in args.parts or PARTS:
        result[part] = PARTS[part](args, data)
        file.write_text(json.dumps(result, indent=1))
        report.write(result, file.with_suffix(".md"), file.with_suffix(".png"))
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
