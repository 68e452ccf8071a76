"""Our log-likelihoods beside lm-evaluation-harness's, item by item, on the same model, rows and settings.

    python3 -m venv /tmp/lmeval && /tmp/lmeval/bin/pip install torch==2.13.0 "lm-eval[hf]==0.4.13"
    .venv/bin/python benchmarks/harness.py --python /tmp/lmeval/bin/python --model FOLDER --dataset QUESTIONS
        [--form cmmlu] [--num_fewshot 5] [--limit 20] [--subjects A B]

The harness reads its own task files (tmmluplus, cmmlu, mmlu, mmlu_continuation), with the rows taken from local files.
Exit code 1 where a log-likelihood differs by more than 1e-4, or any choice, acc, acc_norm or acc_bytes at all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from dsrecipes.data.questions import LETTERS
from dsrecipes.evaluation.log_likelihood import FORMS, context, log_likelihoods, options, score
from dsrecipes.evaluation.rows import QuestionRows

Json = dict[str, Any]
_TEMPLATES = {
    "tmmluplus": ("tmmluplus/default", "_tmmluplus_template_yaml", "tmmluplus_{}.yaml"),
    "cmmlu": ("cmmlu", "_default_template_yaml", "cmmlu_{}.yaml"),
    "mmlu": ("mmlu/default", "_default_template_yaml", "mmlu_{}.yaml"),
    "mmlu_continuation": ("mmlu/continuation", "_continuation_template_yaml", "mmlu_{}.yaml"),
}
"""Form -> folder of the harness's tasks, the file that all subjects share, a subject's file."""
_METRICS = ("acc", "acc_norm", "acc_bytes")


def as_row(record: Json, form: str) -> Json:
    """A question in the columns that the harness's task reads."""
    letter, four = LETTERS[record["answer"]], dict(zip(LETTERS, record["options"], strict=True))
    if form == "cmmlu":
        return {"Question": record["question"], **four, "Answer": letter}
    if form == "tmmluplus":
        return {"question": record["question"], **four, "answer": letter}
    return {"question": record["question"], "choices": record["options"], "answer": record["answer"]}


def write_task(folder: Path, tasks: Path, subject: str, form: str, splits: dict[str, list[Json]]) -> str:
    """A task over local rows that includes the harness's own file of the subject; its name."""
    place, shared, own = _TEMPLATES[form]
    source = tasks / place / own.format(subject)
    files = {}
    for split, records in splits.items():
        path = folder / f"{subject}_{split}.jsonl"
        path.write_text("".join(json.dumps(as_row(each, form), ensure_ascii=False) + "\n" for each in records), "utf-8")
        files[split] = str(path)
    task: Json = {"include": str(source if source.is_file() else tasks / place / shared), "task": f"local_{subject}"}
    if not source.is_file():
        task["description"] = FORMS[form].description.format(subject=subject.replace("_", " "))
    task |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "tag": None}
    task |= {"metric_list": [{"metric": name} for name in _METRICS]}
    (folder / f"local_{subject}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), "utf-8")
    return task["task"]


def harness(python: str, model: str, folder: Path, names: list[str], shots: int, batch_size: int) -> dict[str, list[Json]]:
    """What the harness logged of each item, by task."""
    command = [
        python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
        "--tasks", ",".join(names), "--include_path", str(folder), "--num_fewshot", str(shots), "--device", "cpu",
        "--batch_size", str(batch_size), "--log_samples", "--output_path", str(folder / "out"),
    ]  # fmt: skip
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    quiet.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found = {}
    for name in names:
        (path,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        found[name] = sorted(lines, key=lambda each: each["doc_id"])
    return found


def ours(model: str, asked: list[tuple[Json, list[Json]]], form: str, batch_size: int) -> list[Json]:
    """What dsrecipes finds for each (question, solved questions)."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    pairs = [(context(record, shots, form), f" {choice}") for record, shots in asked for choice in options(record, form)]
    found = log_likelihoods(loaded, tokenizer, pairs, batch_size, tqdm(disable=True))
    return [score(record, found[4 * n : 4 * n + 4], form) for n, (record, _) in enumerate(asked)]


def compare(theirs: list[Json], mine: list[Json], asked: list[tuple[Json, list[Json]]], form: str) -> Json:
    """Largest difference of a log-likelihood, and how many items differ in anything else."""
    largest, unlike = 0.0, dict.fromkeys(("context", "predicted", *_METRICS), 0)
    for other, own, (record, shots) in zip(theirs, mine, asked, strict=True):
        values = [float(each[0]) for each in other["filtered_resps"]]
        largest = max(largest, *(abs(a - b) for a, b in zip(values, own["log_likelihoods"], strict=True)))
        unlike["context"] += other["arguments"]["gen_args_0"]["arg_0"] != context(record, shots, form)
        unlike["predicted"] += LETTERS[max(range(4), key=lambda n: values[n])] != own["predicted"]
        for name in _METRICS:
            unlike[name] += other[name] != own[name]
    means = {name: sum(each[name] for each in mine) / len(mine) for name in _METRICS}
    return {"items": len(mine), "largest_difference": largest, "unlike": unlike, "ours": means}


def main() -> int:
    """Run both and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the python of an environment with lm-eval")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--form", choices=sorted(FORMS), default="tmmluplus")
    parser.add_argument("--num_fewshot", type=int, default=0)
    parser.add_argument("--limit", type=int, default=20, help="questions of each subject")
    parser.add_argument("--subjects", nargs="*")
    parser.add_argument("--batch_size", type=int, default=8)
    flags = parser.parse_args()
    rows = QuestionRows(flags.dataset)
    by_subject: dict[str, list[Any]] = {}
    for item in rows.items("test"):
        by_subject.setdefault(item.record["subject"], []).append(item)
    chosen = {name: by_subject[name][: flags.limit] for name in flags.subjects or sorted(by_subject)}
    shots = rows.shots([item for items in chosen.values() for item in items], "test", flags.num_fewshot)
    dev: dict[str, list[Json]] = {}
    for item in rows.items("train"):
        dev.setdefault(item.record["subject"], []).append(item.record)
    where = subprocess.run(
        [flags.python, "-c", "import lm_eval; print(lm_eval.__path__[0])"], capture_output=True, text=True
    )
    tasks = Path(where.stdout.strip().splitlines()[-1]) / "tasks"
    split = "train" if flags.form == "tmmluplus" else "dev"
    with tempfile.TemporaryDirectory() as kept:
        names = [
            write_task(Path(kept), tasks, name, flags.form, {"test": [i.record for i in items], split: dev[name]})
            for name, items in chosen.items()
        ]
        found = harness(flags.python, flags.model, Path(kept), names, flags.num_fewshot, flags.batch_size)
    asked = [(item.record, shots.get(name, [])) for name, items in chosen.items() for item in items]
    theirs = [each for name in names for each in found[name]]
    told = compare(theirs, ours(flags.model, asked, flags.form, flags.batch_size), asked, flags.form)
    print(json.dumps(told))
    return int(told["largest_difference"] > 1e-4 or any(told["unlike"].values()))


if __name__ == "__main__":
    sys.exit(main())
