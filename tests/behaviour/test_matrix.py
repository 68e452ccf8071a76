"""Exact resume: a run that is killed after any save resumes to the same end, bit for bit.

CI runs a cover in which each value of each column meets each value of every other; `make test-matrix` runs all.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.models import LORA, Small
from support.rank_pool import Ranks

from dsrecipes.runs.folder import RunFolder

pytestmark = pytest.mark.ranks


class Case(NamedTuple):
    """A row of the matrix."""

    engine: str
    tuning: str
    packing: str
    ranks: int
    cut: str
    workers: int
    between: str


COLUMNS: dict[str, tuple] = {
    "engine": ("none", "zero0", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload"),
    "tuning": ("full", "lora", "qlora"),
    "packing": ("packed", "unpacked"),
    "ranks": (1, 2),
    "cut": ("inside", "end"),
    "workers": (0, 1),
    "between": ("steps", "epoch", "stopping"),
}
"""Cut inside an epoch or at its end; evaluations every two steps, each epoch, or each step with early stopping."""
FIGURES = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")


def every() -> list[Case]:
    """Each engine, tuning, packing and number of ranks; the other columns take turns."""
    turns = itertools.cycle(itertools.product(*list(COLUMNS.values())[4:]))
    return [Case(*case, *next(turns)) for case in itertools.product(*list(COLUMNS.values())[:4])]


def cover() -> list[Case]:
    """Few cases in which each two values of different columns meet: greedily the case with the most new pairs.

    ZeRO-1 with offload is left to the whole matrix.
    """
    cases = [Case(*values) for values in itertools.product(*COLUMNS.values()) if values[0] != "zero1_offload"]
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    open_pairs = set().union(*pairs.values())
    chosen = []
    while open_pairs:
        best = max(cases, key=lambda case: len(pairs[case] & open_pairs))
        chosen.append(best)
        open_pairs -= pairs[best]
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cover, or with --whole-matrix all cases."""
    if "case" in metafunc.fixturenames:
        cases = every() if metafunc.config.getoption("--whole-matrix") else cover()
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


@pytest.fixture(scope="module")
def llama(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama with dropout in its attention."""
    folder = tmp_path_factory.mktemp("llama-dropout")
    source = Path(small.recipes["alpaca"][1]["model_name_or_path"])
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short instructions: about five steps of an epoch one by one, and two packed."""
    path = tmp_path_factory.mktemp("sums") / "sums.json"
    rows = [{"instruction": f"Add {n} and {n * n}.", "input": "", "output": f"{n + n * n}."} for n in range(24)]
    path.write_text(json.dumps(rows))
    return path


def flags(case: Case) -> dict[str, Any]:
    """Flags of a case; six steps, saved after each, and eight where they may be stopped early."""
    tuning: dict[str, Any] = {"full": {"lora_r": 0}, "lora": LORA, "qlora": LORA | {"load_in_4bit": True}}[case.tuning]
    between: dict[str, Any] = {
        "steps": {"eval_strategy": "steps", "eval_steps": 2},
        "epoch": {"eval_strategy": "epoch"},
        "stopping": {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "early_stopping_patience": 5,
            "load_best_model_at_end": True,
            # so high that evaluations get worse and early stopping has something to count
            "learning_rate": 0.1 if case.tuning == "full" else 1.0,
        },
    }[case.between]
    return {
        "deepspeed": case.engine,
        "packing": case.packing == "packed",
        "max_length": 400,
        "max_steps": 8 if case.between == "stopping" else 6,
        "save_steps": 1,
        "save_total_limit": None,
        # most checkpoints are between two log lines, so a resume must restore the losses since the last one
        "logging_steps": 3,
        "dataloader_num_workers": case.workers,
        **tuning,
        **between,
    }


def cut_at(run: dict[str, Any], case: Case) -> int:
    """The step of the checkpoint to resume from."""
    states = [
        json.loads((path / "trainer_state.json").read_text()) for path in RunFolder(Path(run["path"])).all_checkpoints()
    ]
    # not the last one, after which nothing would be left to train
    steps = [s["global_step"] for s in states[:-1] if float(s["epoch"]).is_integer() == (case.cut == "end")]
    return steps[len(steps) // 2]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    one_rank: Ranks, two_ranks: Ranks, small: Small, llama: Path, sums: Path, tmp_path: Path, case: Case
) -> None:
    ranks = {1: one_rank, 2: two_ranks}[case.ranks]

    def run(**changed: Any) -> dict[str, Any]:
        values = small.values("alpaca", **flags(case), model_name_or_path=str(llama), dataset=str(sums), **changed)
        return ranks.run("train", **values)[0]

    whole = run(output_dir=str(tmp_path / "whole"))
    cut = cut_at(whole, case)
    folder = RunFolder(shutil.copytree(whole["path"], tmp_path / "resumed"))
    for path in folder.all_checkpoints():
        if int(path.name[11:]) > cut:
            shutil.rmtree(path)
    shutil.rmtree(folder.model)
    resumed = run(output_dir=str(folder.path), resume_from_checkpoint="auto")
    assert resumed["step"] == whole["step"] and (case.between == "stopping" or whole["step"] == 6)
    lines = [[{key: line[key] for key in FIGURES if key in line} for line in result["log"]] for result in (whole, resumed)]
    assert lines[0] == lines[1]
    ours, theirs = (load_file(next(Path(result["path"], "model").glob("*.safetensors"))) for result in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
