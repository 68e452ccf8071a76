"""evaluate and compare on runs of the recipes: the run's own figures again, and what differs item by item."""

import json

import pytest
from support.tiny import STARTER, instructions, refusal, tiny_bert, tiny_gpt2, tiny_llama, write_rows

from dsrecipes import load_recipe
from dsrecipes.cli import main
from dsrecipes.errors import UserError
from dsrecipes.evaluation.compare import compare, overlap, pair
from dsrecipes.evaluation.evaluate import Evaluation, evaluate
from dsrecipes.evaluation.metrics import METRICS, Metric
from dsrecipes.evaluation.tasks import Settings
from dsrecipes.inference.finished import open_run

RUN = {
    "profile": "starter", "use_cpu": True, "deepspeed": "none", "max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0,
    "per_device_train_batch_size": 2, "global_batch_size": 4, "lora_r": 0, "disable_tqdm": True, "verify_model": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A short run of each kind: its folder and metrics by name."""
    folder = tmp_path_factory.mktemp("evaluated")
    rows = write_rows(folder / "rows.jsonl", instructions(24))
    values = {
        "text": ("gpt2_clm", {"model_name_or_path": tiny_gpt2(), "max_length": 64, "from_scratch": False}),
        "questions": ("bert_tmmlu_qa", {"model_name_or_path": tiny_bert(), "max_length": 48, "from_scratch": False}),
        "answers": (
            "alpaca_llama_sft",
            {
                "model_name_or_path": tiny_llama(), "dataset": rows, "validation_split": 0.25, "max_length": 400,
                "prompt_style": "alpaca", "lora_r": 4,
            },
        ),
    }  # fmt: skip
    results = {}
    for name, (recipe, changed) in values.items():
        results[name] = load_recipe(recipe, **RUN | changed, output_dir=str(folder / name)).run()
    return results


@pytest.mark.parametrize("name", ["text", "answers"])
def test_the_loss_is_the_run_s_own(done, name):
    result = evaluate(str(done[name].path), split="validation", batch_size=3)
    assert result["figures"]["loss"] == pytest.approx(done[name].metrics["eval_loss"], abs=1e-5)
    assert result["figures"]["perplexity"] == pytest.approx(done[name].metrics["eval_perplexity"], rel=1e-4)
    assert result["figures"]["tokens"] == sum(item["tokens"] for item in result["items"])


@pytest.mark.parametrize(("split", "prefix"), [("validation", "eval"), ("test", "test")])
def test_the_accuracy_is_the_run_s_own(done, split, prefix):
    metrics, figures = done["questions"].metrics, evaluate(str(done["questions"].path), split=split)["figures"]
    for name in ("accuracy", "accuracy_by_subject", "accuracy_by_group"):
        assert figures[name] == metrics[f"{prefix}_{name}"]
    assert figures["loss"] == pytest.approx(metrics[f"{prefix}_loss"], abs=1e-5)
    right = sum(figures["confusion"][letter][letter] for letter in range(4))
    assert right / sum(map(sum, figures["confusion"])) == figures["accuracy"]
    assert sum(each["questions"] for each in figures["bins"]) == sum(map(sum, figures["confusion"]))


def test_another_file_is_measured_whole(done, tmp_path):
    rows = write_rows(tmp_path / "few.jsonl", instructions(5))
    result = evaluate(str(done["answers"].path), dataset=rows, task="answers", max_new_tokens=8, batch_size=2)
    assert (result["split"], result["rows"]) == ("train", 5)
    assert [item["item"].rpartition(" ")[2] for item in result["items"]] == ["1", "2", "3", "4", "5"]
    assert result["items"][0]["reference"] == "1 2" and "Count to 1." in result["items"][0]["prompt"]
    (tmp_path / "text.txt").write_text("The ferry left at nine. " * 30)
    again = evaluate(str(done["text"].path), dataset=str(tmp_path / "text.txt"))
    assert again["split"] == "train" and again["rows"] > 1 and again["items"][-1]["tokens"] < 63  # the short last block too


def test_questions_for_a_model_that_writes(done, tmp_path):
    flags = {"dataset": str(STARTER / "data" / "tmmlu"), "task": "choices", "limit": 6, "num_fewshot": 1}
    result = evaluate(str(done["answers"].path), **flags)
    assert (result["split"], result["rows"], result["form"]) == ("test", 6, "tmmluplus")
    assert all(
        item["log_likelihoods"] == pytest.approx([max(item["log_likelihoods"])] * 4, abs=20) for item in result["items"]
    )
    assert result["figures"]["accuracy"] == sum(item["acc"] for item in result["items"]) / 6


def test_base_against_tuned(done):
    result = compare(str(done["answers"].path), split="validation")
    (found,) = result["pairs"]
    each = found["differences"]["loss"]
    assert each["second"] == pytest.approx(done["answers"].metrics["eval_loss"], abs=1e-5)
    assert each["low"] <= each["difference"] <= each["high"] < 0 and each["shown"]
    assert result["overlaps"][0]["met"] == []


def test_a_run_against_itself_shows_no_difference(done, capsys):
    path = str(done["questions"].path)
    assert main(["compare", path, path]) == 0
    printed = capsys.readouterr().out
    assert "no difference shown" in printed and "0 right in the first alone, 0 in the second alone" in printed
    assert "McNemar's exact test p = 1 (no difference shown)" in printed


def test_rows_that_were_trained_on_are_named(done, tmp_path):
    path = str(done["answers"].path)
    own = evaluate(path, split="validation", task="answers", max_new_tokens=1)["items"]
    kept = {int(item["item"].rpartition(" ")[2]) for item in own}
    rows = [row | {"instruction": row["instruction"].upper()} for row in instructions(24)]
    result = compare(path, dataset=write_rows(tmp_path / "all.jsonl", [*rows, {"instruction": "Sing.", "output": "La."}]))
    (found,) = result["overlaps"]
    assert found["rows"] == 25 and len(kept) == 6
    assert {int(each["item"].rpartition(" ")[2]) for each in found["met"]} == {*range(1, 25)} - kept
    assert all(each["training row"].rpartition(" ")[2] == each["item"].rpartition(" ")[2] for each in found["met"])


@pytest.mark.parametrize(("task", "rows"), [("answers", range(5, 10)), ("loss", range(5, 25))])
def test_overlap_is_of_the_rows_that_are_measured(done, tmp_path, task, rows):
    """Not of those of weight 0; --limit counts rows, but sequences for --task loss."""
    path = str(done["answers"].path)
    own = evaluate(path, split="validation", task="answers", max_new_tokens=1)["items"]
    held_out = {int(item["item"].rpartition(" ")[2]) for item in own}
    data = write_rows(tmp_path / "all.jsonl", [row | {"weight": int(n >= 4)} for n, row in enumerate(instructions(24))])
    found = overlap(Evaluation(open_run(path), data, None, task, False, Settings(limit=5), None))
    assert (
        found["rows"] == len(rows) and {int(each["item"].rpartition(" ")[2]) for each in found["met"]} == {*rows} - held_out
    )


@pytest.mark.parametrize(
    ("losses", "weights", "first", "second"),
    [([1.0, 2.0], ([3.0, 1.0], [1.0, 1.0]), 1.25, 1.5), ([2.0, 2.0], ([3.0, 1.0], [1.0, 5.0]), 2.0, 2.0)],
)
def test_runs_with_other_class_weights_are_each_weighted_by_their_own(losses, weights, first, second):
    results = []
    for own in weights:
        items = [
            {"key": str(n), "loss": loss, "tokens": 1, "weight": weight}
            for n, (loss, weight) in enumerate(zip(losses, own, strict=True))
        ]
        results.append({"run": "r", "weights": "tuned", "task": "labels", "rows": 2, "items": items})
    row = pair(*results)["differences"]["loss"]
    assert (row["first"], row["second"], row["difference"]) == (first, second, second - first)
    assert row["low"] == 0 and row["high"] == second - first and not row["shown"]


def test_flips_are_counted_and_named():
    def result(letters, weights):
        items = [
            {"item": f"row {n}", "key": str(n), "subject": "s", "question": "?", "options": list("wxyz"), "answer": "A",
             "predicted": letter, "acc": float(letter == "A")}
            for n, letter in enumerate(letters)
        ]  # fmt: skip
        table = {"s": {"accuracy": letters.count("A") / len(letters), "questions": len(letters)}}
        head = {"run": "r", "weights": weights, "task": "choices", "dataset": "d", "rows": len(letters)}
        return head | {"items": items, "figures": {"accuracy_by_subject": table}}

    found = pair(result("AABBBBBB", "base"), result("BAAAAAAA", "tuned"))
    assert [each["item"] for each in found["only_first"]] == ["row 0"]
    assert len(found["only_second"]) == 6 and found["only_second"][0]["first"] == "B"
    assert found["mcnemar_p"] == 2 * (1 + 7) / 2**7
    assert found["by_subject"]["s"] == {"first": 0.25, "second": 0.875, "questions": 8}
    other = result("AABBBBBB", "base")
    other["items"][0]["key"] = "another"
    with pytest.raises(UserError, match="DSR480"):
        pair(other, result("BAAAAAAA", "tuned"))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("answers", ["--task", "choices"], "[DSR473]"),
        ("answers", ["--num_fewshot", "2"], "[DSR474]"),
        ("questions", ["--task", "loss"], "measured by --task choices [DSR472]"),
        ("text", ["--task", "answers"], "[DSR477]"),
        ("answers", ["--split", "test"], "it has validation, train [DSR484]"),
        ("answers", ["--dataset", "nothing.jsonl"], "no such file"),
        ("answers", ["--limit", "0"], "at least 1"),
        ("answers", ["--out", "/nowhere/x.json"], "no folder /nowhere [DSR007]"),
    ],
)
def test_what_cannot_be_measured_is_refused(done, capfd, name, flags, message):
    assert message in refusal(main, ["evaluate", done[name].path, *flags], capfd)


def test_out_holds_every_item_and_is_not_overwritten(done, tmp_path, capfd):
    out = tmp_path / "result.json"
    assert main(["evaluate", str(done["answers"].path), "--limit", "2", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["items"]) == 2
    assert "[DSR007]" in refusal(main, ["evaluate", done["answers"].path, "--out", out], capfd)


def test_a_new_metric_is_one_entry_of_the_table(done, tmp_path, monkeypatch, capsys):
    """evaluate reports its mean, compare its difference; nothing else names it."""
    length = Metric("answers", "characters", score=lambda item: float(len(item["answer"])))
    monkeypatch.setattr("dsrecipes.evaluation.metrics.METRICS", [*METRICS, length])
    path, rows = str(done["answers"].path), write_rows(tmp_path / "few.jsonl", instructions(3))
    flags = [path, "--dataset", rows, "--task", "answers", "--max_new_tokens", "4", "--out"]
    assert main(["evaluate", *flags, str(tmp_path / "evaluated.json")]) == 0
    result = json.loads((tmp_path / "evaluated.json").read_text())
    mean = sum(len(item["answer"]) for item in result["items"]) / 3
    assert result["figures"]["characters"] == pytest.approx(mean)
    assert f"characters {mean:,.4f}" in capsys.readouterr().out
    assert main(["compare", *flags, str(tmp_path / "compared.json")]) == 0
    assert f"\n{'characters':<14}" in capsys.readouterr().out
    difference = json.loads((tmp_path / "compared.json").read_text())["pairs"][0]["differences"]["characters"]
    assert difference["second"] == pytest.approx(mean) and difference["low"] <= difference["difference"]
