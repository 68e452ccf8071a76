"""Seconds from the command to the end of the first step, streamed and prepared beforehand, and after a resume.

.venv/bin/python benchmarks/streaming.py                       2 GB of each form; about ten minutes, 2 GB of disk at a time
.venv/bin/python benchmarks/streaming.py --gb 0.1 --forms jsonl csv

Rows are Stanford Alpaca's, repeated with a number in front of each. The model is stories260K, so that training costs little.
Writes a table to benchmarks/results/, and deletes the files.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
MODEL = SHARED / "models" / "stories260K"
FORMS = ("jsonl", "csv", "parquet", "txt", "jsonl.gz")
SMALL_GB = 0.1
"""Of the file that is prepared without streaming, for comparison."""
_BATCH = 20_000


def numbered() -> Iterator[dict[str, str]]:
    """Rows without end, no two the same."""
    rows = [json.loads(line) for line in _lines()]
    number = 0
    while True:
        for row in rows:
            number += 1
            yield {**row, "instruction": f"{number}. {row['instruction']}"}


def _lines() -> list[str]:
    with gzip.open(SHARED / "alpaca" / "alpaca_45k.json.gz", "rt", encoding="utf-8") as file:
        return [json.dumps(row) for row in json.load(file) if row["output"].strip()]


def _text(rows: list[dict[str, str]], form: str, first: bool) -> str:
    if form == "txt":
        return "".join(f" = {row['instruction'][:40].strip()} = \n\n{row['output']}\n\n" for row in rows)
    if form.startswith("jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    if first:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write(path: Path, form: str, size: float) -> None:
    """A file of about `size` bytes before packing."""
    rows, written = numbered(), 0
    batches = ([next(rows) for _ in range(_BATCH)] for _ in iter(int, 1))
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(next(batches))
        with pq.ParquetWriter(path, table.schema) as writer:
            while path.stat().st_size < size:
                writer.write_table(table)
                table = pa.Table.from_pylist(next(batches))
        return
    with gzip.open(path, "wt", compresslevel=1) if form.endswith(".gz") else path.open("w", encoding="utf-8") as file:
        while written < size:
            text = _text(next(batches), form, written == 0)
            written += file.write(text)


def run(path: Path, form: str, folder: Path, steps: int, **flags: Any) -> dict[str, float]:
    """Train: seconds to the first line (imports), to the end of the first step, GB of memory then, tokens/s of the last step."""
    recipe = "gpt2_clm" if form == "txt" else "alpaca_llama_sft"
    flags = {
        "dataset": path, "model_name_or_path": MODEL, "output_dir": folder, "max_steps": steps, "max_length": 512,
        "from_scratch": "false", "lora_r": 0, "eval_strategy": "no", "validation_split": 0, "save_steps": steps, "logging_steps": 1,
        "use_cpu": "true", "deepspeed": "zero2", "global_batch_size": 16, "skip_bad_rows": "true", "verify_model": "false",
        "prompt_style": "alpaca", **flags,
    }  # fmt: skip
    command = [sys.executable, "-m", "dsrecipes.cli", "train", recipe]
    command += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    began = time.time()
    cache = {"DSRECIPES_CACHE": str(folder.parent / "cache"), "PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | cache) as process:
        assert process.stdout is not None
        said = ""
        for said in process.stdout:
            if said.startswith("loading"):
                break
        imports = time.time() - began
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {said}")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first = next(line for line in log if "loss" in line and line["time"] > began)
    return {
        "imports": imports, "first step": first["time"] - began, "memory": first["peak_memory_gb"],
        "tokens/s": log[-1].get("tokens_per_second", 0.0),
    }  # fmt: skip


def measure(form: str, gb: float, steps: int) -> dict[str, Any]:
    """One form: a streamed run, its resume, and a smaller file without streaming."""
    with tempfile.TemporaryDirectory(prefix="streaming-") as scratch:
        work = Path(scratch)
        path = work / f"rows.{form}"
        if shutil.disk_usage(work).free < gb * 1.5e9:
            raise SystemExit(f"{work}: less than {gb * 1.5:.1f} GB are free; set TMPDIR")
        write(path, form, gb * 1e9)
        found = {"bytes": path.stat().st_size, "streamed": run(path, form, work / "run", steps, streaming="true")}
        again = {"streaming": "true", "resume_from_checkpoint": "auto", "allow_changed": "max_steps"}
        found["resumed"] = run(path, form, work / "run", steps + 5, **again)
        path.unlink()
        write(path, form, SMALL_GB * 1e9)
        found["small"] = path.stat().st_size
        found["prepared"] = run(path, form, work / "prepared", steps)
    print(form, json.dumps(found), flush=True)
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"| file | GB | streamed: first step, s | of it imports | GB of memory | resumed: first step, s | {SMALL_GB} GB prepared: first step, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for form, found in results.items():
        streamed = found["streamed"]
        lines.append(
            f"| {form} | {found['bytes'] / 1e9:.2f} | {streamed['first step']:.1f} | {streamed['imports']:.1f} | "
            f"{streamed['memory']:.2f} | {found['resumed']['first step']:.1f} | {found['prepared']['first step']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    results = {form: measure(form, options.gb, options.steps) for form in options.forms}
    text = table(results)
    path = HERE / "results" / f"{datetime.date.today()}-streaming.md"
    path.write_text(f"# Streaming, {options.gb:g} GB, {os.cpu_count()} cores\n\n{text}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
