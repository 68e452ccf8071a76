"""Preparation of ever more rows: seconds, peak memory, the second start, and the disk that they take.

.venv/bin/python benchmarks/size.py --rows 50000 500000 [--form json] [--model FOLDER]

The rows are Alpaca's, again and again with another number in each instruction, so that no two are equal. A start is a
command of its own: imports, reading, tokenizing with a held-out split, packing. Memory is the proportional set size of
the process and its workers (pages of libraries and of mapped files that it shares count in part), sampled four times a
second.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import inputs
import report

WORK = bench.WORK / "size"
MODEL = bench.DATA.parent / "models" / "stories260K"
HELD_OUT = 0.1
Json = dict[str, Any]


def varied() -> Iterator[Json]:
    """Alpaca's rows without end, all different."""
    rows = inputs.read_rows([bench.DATA / "alpaca_5k.json", bench.DATA / "alpaca_45k.json.gz"])
    for number, row in enumerate(itertools.cycle(rows)):
        yield row | {"instruction": f"{row['instruction']} (task {number})"}


def make_file(count: int, form: str) -> Path:
    """A file of `count` rows, as JSON lines or as one JSON array, written once."""
    path = WORK / f"{count}.{form}"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    begin, between, end = ("[", ",\n", "]\n") if form == "json" else ("", "\n", "\n")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(begin)
        for number, row in enumerate(itertools.islice(varied(), count)):
            file.write((between if number else "") + json.dumps(row, ensure_ascii=False))
        file.write(end)
    scratch.rename(path)
    return path


def start(path: Path, model: Path, length: int, cache: Path, tree: Path) -> Json:
    """One start as a process of its own."""
    command = [sys.executable, __file__, "--start", str(path), "--model", str(model), "--max_length", str(length)]
    environment = os.environ | {"DSRECIPES_CACHE": str(cache), "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, bench.memory(process.pid))
        time.sleep(0.25)
    seconds = time.perf_counter() - began
    assert process.stdout is not None and process.returncode == 0, process.returncode
    return json.loads(process.stdout.read().splitlines()[-1]) | {"seconds": seconds, "bytes": peak}


def prepare_once(path: Path, model: Path, length: int) -> None:
    """What a start does with its rows, up to the packed sequences; prints what came of it."""
    from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
    from transformers import AutoTokenizer

    from dsrecipes.config.encoding import EncodeOptions
    from dsrecipes.data.load import load_splits
    from dsrecipes.data.prepare import prepare
    from dsrecipes.data.sequences import Sequences
    from dsrecipes.io.console import Console

    tokenizer = AutoTokenizer.from_pretrained(model)
    began = time.perf_counter()
    splits = prepare(
        AlpacaLlamaSft, load_splits(str(path)), tokenizer, EncodeOptions(length, "alpaca"), validation_split=HELD_OUT,
        seed=0, skip_bad_rows=True, console=Console(out=sys.stderr),
    )  # fmt: skip
    prepared = time.perf_counter()
    sequences = {name: len(Sequences(split.path, length)) for name, split in splits.items()}
    found = {"prepare": prepared - began, "pack": time.perf_counter() - prepared, "sequences": sequences}
    found["rows"] = {name: split.stats.kept for name, split in splits.items()}
    found["dropped"] = {name: split.stats.dropped for name, split in splits.items()}
    found["tokens"] = sum(split.stats.tokens for split in splits.values())
    print(json.dumps(found))


def measure(count: int, args: argparse.Namespace) -> Json:
    """The first and the second start on a file."""
    path, cache = make_file(count, args.form), WORK / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    load = os.getloadavg()[0]
    first = start(path, args.model, args.max_length, cache, args.tree)
    disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    second = start(path, args.model, args.max_length, cache, args.tree)
    assert (first["sequences"], first["rows"]) == (second["sequences"], second["rows"])
    shutil.rmtree(cache)
    sizes = {"file": path.stat().st_size, "disk": disk, "load": [load, os.getloadavg()[0]]}
    if args.delete:
        path.unlink()
    return {"first": first, "second": second, **sizes}


def markdown(result: Json) -> str:
    """The tables."""
    machine = result["machine"]
    lines = [
        f"# Size of the data: {result['date']} on {result['host']}", "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB. {result['about']}",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].replace("\n", " "), "",
    ]  # fmt: skip
    head = [
        "run", "rows kept", "file, GB", "first start, s", "of it preparing", "packing", "peak memory, GB", "second start, s",
        "of it", "its peak, GB", "cache, GB", "tokens", "sequences", "load",
    ]  # fmt: skip
    rows = []
    for name, own in result["runs"].items():
        first, second = own["first"], own["second"]
        rows.append([
            name, f"{sum(first['rows'].values()):,}", f"{own['file'] / 1e9:.2f}", f"{first['seconds']:.0f}",
            f"{first['prepare']:.1f}", f"{first['pack']:.1f}", f"{first['bytes'] / 1e9:.2f}", f"{second['seconds']:.0f}",
            f"{second['prepare'] + second['pack']:.1f}", f"{second['bytes'] / 1e9:.2f}", f"{own['disk'] / 1e9:.2f}",
            f"{first['tokens']:,}", f"{sum(first['sequences'].values()):,}", f"{own['load'][0]:.0f} to {own['load'][1]:.0f}",
        ])  # fmt: skip
    return "\n".join([*lines, *report.table(head, rows)]) + "\n"


def main() -> None:
    """Measure each size, and write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--form", choices=("jsonl", "json"), default="jsonl")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a tokenizer")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--tree", type=Path, default=bench.HERE.parent, help="another checkout of dsrecipes, to compare")
    parser.add_argument("--label", default="", help="what to call the runs in the table")
    parser.add_argument("--about", default="", help="a sentence about the machine's other work, for the table")
    parser.add_argument("--delete", action="store_true", help="delete each file of rows")
    parser.add_argument("--out", type=Path, default=bench.HERE / "results")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        return prepare_once(args.start, args.model, args.max_length)
    today = datetime.date.today().isoformat()
    file = args.out / f"{today}-{platform.node()}-size.json"
    result = json.loads(file.read_text()) if file.is_file() else {"runs": {}, "about": ""}
    result |= {"date": today, "host": platform.node(), "machine": bench.machine(), "about": args.about or result["about"]}
    for count in args.rows:
        own = measure(count, args)
        result["runs"][f"{args.label or 'ours'}, {count:,} rows of {args.form}"] = own
        file.write_text(json.dumps(result, indent=1))
        file.with_suffix(".md").write_text(markdown(result))
        print(json.dumps(own), flush=True)
    return None


if __name__ == "__main__":
    main()
