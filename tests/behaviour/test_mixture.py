"""A run on several data sets: header, figures by source, and resuming after SIGKILL, on as many ranks and on fewer."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.models import Small
from support.rank_pool import CaseError, Ranks
from support.tiny import instructions, run_recipe, tiny_bert, write_rows

from dsrecipes import UserError, load_recipe
from dsrecipes.evaluation.evaluate import evaluate
from dsrecipes.evaluation.rows import EvaluationRows
from dsrecipes.inference.finished import FinishedRun
from dsrecipes.reporting.report import report
from dsrecipes.runs.folder import RunFolder

pytestmark = pytest.mark.ranks
NAMES = ("counting", "short", "bundled")


@pytest.fixture(scope="module")
def mixed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of a run on three sources: a file, a folder whose validation rows have a file, and bundled rows."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "short").mkdir()
    write_rows(folder / "short" / "train.jsonl", [{"instruction": f"Say {n}.", "output": str(n)} for n in range(40)])
    write_rows(folder / "short" / "valid.jsonl", [{"instruction": "Say yes.", "output": "yes"}] * 3)
    common = [{"instruction": f"Repeat {n}.", "output": str(n)} for n in range(12)]
    bundled = json.loads(Path(small.recipes["alpaca"][1]["dataset"]).read_text())
    dataset = [
        {"path": write_rows(folder / "counting.json", instructions(30) + common), "weight": 2, "max_length": 300},
        {"path": str(folder / "short"), "weight": 1},
        {"path": write_rows(folder / "last.json", bundled + common), "rows": 6, "name": "bundled"},
    ]
    return {
        "dataset": dataset, "validation_split": 0.2, "max_steps": 14, "save_steps": 4, "eval_steps": 4, "max_length": 400,
        "deepspeed": "zero2", "per_device_train_batch_size": 2, "metric_for_best_model": "eval_short_loss",
        "load_best_model_at_end": False, "save_strategy": "steps",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(two_ranks: Ranks, small: Small, mixed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run without an interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return two_ranks.run("disturbed", events={}, **small.values("alpaca", output_dir=str(folder), **mixed))[0]


def figures(run: dict[str, Any]) -> list[dict[str, float]]:
    """The lines of log.jsonl without what a clock measures."""
    return [{key: value for key, value in line.items() if key.endswith(("step", "loss", "norm"))} for line in run["log"]]


def test_header_log_and_report_name_the_sources(whole: dict[str, Any]) -> None:
    run = RunFolder(Path(whole["path"]))
    splits = json.loads(run.data.read_text())
    train = splits["train"]["sources"]
    drawn = {name: train[name]["rows_an_epoch"] for name in NAMES}
    weighted = train["counting"]["kept"] + train["short"]["kept"]
    assert drawn["bundled"] == 6 and drawn["counting"] + drawn["short"] == weighted
    assert abs(drawn["counting"] - 2 * weighted / 3) < 1
    assert sum(source["tokens"] for source in train.values()) == splits["train"]["tokens"]
    assert f"counting: {train['counting']['kept']} rows, {train['counting']['tokens']:,} tokens" in whole["said"]
    assert f"{drawn['short']} rows and about" in whole["said"] and "an epoch (weight 1)" in whole["said"]
    assert whole["log"][-1]["epoch"] >= 2  # rows were drawn again
    last = [line for line in whole["log"] if "eval_loss" in line][-1]
    sizes = {name: splits["validation"]["sources"][name]["supervised"] for name in NAMES}
    mean = sum(last[f"eval_{name}_loss"] * sizes[name] for name in NAMES) / sum(sizes.values())
    assert last["eval_loss"] == pytest.approx(mean, rel=1e-6)
    assert whole["metrics"].keys() >= {f"eval_{name}_{figure}" for name in NAMES for figure in ("loss", "perplexity")}
    page = report(run.path, out=run.path / "page.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in NAMES) and "eval_counting_loss" in page


def test_evaluate_measures_the_same_rows_by_source(whole: dict[str, Any]) -> None:
    result = evaluate(whole["path"])
    assert result["split"] == "validation" and result["figures"]["loss"] == pytest.approx(
        whole["metrics"]["eval_loss"], abs=1e-5
    )
    by_source = result["figures"]["by_source"]
    assert {name: values["loss"] for name, values in by_source.items()} == pytest.approx(
        {name: whole["metrics"][f"eval_{name}_loss"] for name in NAMES}, abs=1e-5
    )
    rows = EvaluationRows(FinishedRun(RunFolder(Path(whole["path"]))))
    held = {name: [item for item in rows.items("validation") if item.source == name] for name in NAMES}
    assert [item.record["output"] for item in held["short"]] == ["yes"] * 3
    trained = {json.dumps(item.record) for item in rows.items("train")}
    assert any(item.row in [other.row for other in held["bundled"]] for item in held["counting"])
    assert held["counting"] and not trained & {json.dumps(item.record) for items in held.values() for item in items}


def test_a_killed_run_resumes_on_two_ranks_and_on_one(
    two_ranks: Ranks, one_rank: Ranks, small: Small, mixed: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    case = small.values("alpaca", output_dir=str(tmp_path / "run"), resume_from_checkpoint="auto", **mixed)
    with pytest.raises(CaseError, match="died"):
        two_ranks.run("disturbed", events={"10": [["signal", None, signal.SIGKILL]]}, **case)
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.complete_checkpoints()] == ["checkpoint-4", "checkpoint-8"]
    shutil.copytree(folder.path, tmp_path / "copy")
    resumed = two_ranks.run("train", **case)[0]
    assert figures(resumed) == figures(whole)
    fewer = small.values("alpaca", output_dir=str(tmp_path / "copy"), resume_from_checkpoint="auto", **mixed)
    alone = one_rank.run("train", **fewer)[0]
    for ours, theirs in zip(figures(alone), figures(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    other = mixed | {"dataset": [*mixed["dataset"][:2], mixed["dataset"][2] | {"rows": 7}]}
    fewer = small.values("alpaca", output_dir=str(tmp_path / "copy"), resume_from_checkpoint="auto", **other)
    with pytest.raises(UserError, match=r"mixture is .*'bundled': 6\D.* there and .*'bundled': 7\D.*DSR376"):
        one_rank.run("train", **fewer)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_blocks_and_questions_are_mixed_too(one_rank: Ranks, small: Small, tmp_path: Path, name: str) -> None:
    recipe, values = small.recipes[name]
    path = Path(values["dataset"])
    copied = shutil.copytree(path, tmp_path / "more") if path.is_dir() else shutil.copy(path, tmp_path / "more.jsonl")
    dataset = [{"path": str(path), "weight": 1, "name": "one"}, {"path": str(copied), "weight": 3}]
    case = small.values(name, dataset=dataset, max_steps=2, eval_steps=2, output_dir=str(tmp_path / "run"))
    run = one_rank.run("train", **case)[0]
    sources = json.loads(RunFolder(tmp_path / "run").data.read_text())["train"]["sources"]
    assert sources["more"]["rows_an_epoch"] == pytest.approx(3 * sources["one"]["rows_an_epoch"], abs=2)
    # the same rows are held out of both
    assert run["metrics"]["eval_one_loss"] == pytest.approx(run["metrics"]["eval_more_loss"], abs=1e-6)
    assert run["metrics"]["eval_one_loss"] == pytest.approx(run["metrics"]["eval_loss"], abs=1e-6)
    if name == "bert":
        held = json.loads((tmp_path / "run" / "test_qa_data.json").read_text())
        assert len(held) == 2 * len({item["question"] for item in held}) > 0


def test_a_source_without_what_it_needs_is_refused(small: Small, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json", instructions(9))
    bad = write_rows(tmp_path / "bad.json", [{"instruction": "", "output": "x"}])
    for dataset, more, message in (
        ([rows, {"path": rows, "split": "test", "name": "held"}], {}, f"{rows} has no test rows, only train"),
        ([rows, bad], {}, f"{bad}, row 1"),
        ([rows, {"path": rows, "max_length": 3, "name": "cut"}], {}, f"{rows}: no train row has a token to train on"),
        ([rows, {"path": rows, "weight": 1e-6, "name": "few"}], {}, "weight 1e-06 is less than one of the 18 rows"),
        ([rows], {"eval_dataset": [{"path": rows, "split": "validation"}]}, f"{rows} has no validation rows, only train"),
        ([rows], {"eval_dataset": [rows, bad], "metric_for_best_model": "x"}, f"{bad}, row 1"),
    ):
        values = small.values("alpaca", dataset=dataset, output_dir=str(tmp_path / "run"), **{"validation_split": 0} | more)
        with pytest.raises(UserError) as error:
            load_recipe(values["recipe"], **values["values"]).build_trainer()
        assert message in str(error.value)


def test_labels_of_validation_sets_are_numbered_as_the_training_rows(tmp_path: Path) -> None:
    labels = {"train": ["no", "yes", "yes", "no"], "first": ["yes"] * 3, "second": ["no", "yes"]}
    files = {
        name: write_rows(
            tmp_path / f"{name}.jsonl", [{"text": f"row {i}", "label": label} for i, label in enumerate(values)]
        )
        for name, values in labels.items()
    }
    story = load_recipe(
        "seq_classification", profile="full", model_name_or_path=tiny_bert(), dataset=files["train"], max_length=16,
        eval_dataset=[files["first"], files["second"]], dry_run=True, use_cpu=True, deepspeed="none", max_steps=1,
        global_batch_size=2,
    )  # fmt: skip
    splits = run_recipe(story)[0].prepared.rows.splits
    held = splits["validation"].parts
    assert {name: part.data["labels"][:] for name, part in held.items()} == {"first": [1] * 3, "second": [0, 1]}
    assert splits["train"].data["labels"][:] == [0, 1, 1, 0]


@pytest.mark.parametrize("columns", [{"instruction": "ask", "output": "said"}, "instruction=ask,output=said"])
def test_a_source_has_columns_of_its_own(small: Small, tmp_path: Path, columns: Any) -> None:
    rows = write_rows(tmp_path / "rows.json", instructions(9))
    other = write_rows(tmp_path / "other.json", [{"ask": f"Say {n}.", "said": str(n)} for n in range(7)])
    dataset = [rows, {"path": other, "columns": columns}]
    values = small.values("alpaca", dataset=dataset, validation_split=0, eval_strategy="no", dry_run=True)
    story = load_recipe(values["recipe"], **values["values"])
    rows = run_recipe(story)[0].prepared.rows
    assert {name: part.stats.kept for name, part in rows.splits["train"].parts.items()} == {"rows": 9, "other": 7}
    assert "said" in str(rows.sources[1].data.columns) and not story.config.data.columns
