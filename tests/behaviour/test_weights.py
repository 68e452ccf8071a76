"""Weights of rows, turns and classes: a row of weight 2 trains as the row given twice, on any ranks and at any stage."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.rank_pool import Ranks
from support.tiny import arrow_file, refusal, run_recipe, tiny_bert, tiny_llama, tiny_moe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

from dsrecipes import UserError, load_recipe
from dsrecipes.config.values import as_weight, parse_class_weights
from dsrecipes.data.collate import CausalCollator, PaddingCollator
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.records import record_hash
from dsrecipes.data.sequences import PADDING_ROW, Sequences
from dsrecipes.data.weights import WEIGHTS, class_weights, normalize_weights, row_weight
from dsrecipes.evaluation.compare import pair
from dsrecipes.evaluation.evaluate import evaluate
from dsrecipes.run import main
from dsrecipes.runs.log import read_log

RECIPES = """
from dsrecipes import RecipeBase
from dsrecipes.data.weights import row_weight, row_weights

class Mine(RecipeBase):
    auto_class = "AutoModelFor{head}"

    @staticmethod
    def format_row(row):
        return dict(row) | row_weight(row)

    @staticmethod
    def encode(records, tokenizer, options):
        ids = [record["ids"] for record in records]
        if "{head}" == "SequenceClassification":
            return {{"input_ids": ids, "labels": [record["label"] for record in records], "weights": row_weights(records)}}
        labels = [[-100, *row[1:]] for row in ids]
        weights = [record.get("weights") or [record.get("weight", 1.0)] * len(record["ids"]) for record in records]
        return {{"input_ids": ids, "labels": labels, "weights": weights}}
"""
# SGD, whose update is proportional to the gradient: Adam would hide a wrong scale of the loss
SGD = {
    "max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "weight_decay": 0.0, "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
    "use_cpu": True, "deepspeed": "none", "max_length": 32, "verify_model": False, "hang_timeout": 300,
}  # fmt: skip


@functools.cache
def tiny_classifier() -> str:
    """A folder with tiny_bert's encoder and a head of three classes."""
    folder = tempfile.mkdtemp()
    set_seed(0)
    BertForSequenceClassification(BertConfig.from_pretrained(tiny_bert(), num_labels=3)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert()).save_pretrained(folder)
    return folder


def recipe(folder: Path, head: str) -> str:
    """A recipe of token ids, in a file."""
    path = folder / f"{head.lower()}.py"
    path.write_text(RECIPES.format(head=head))
    return str(path)


def rows_of(weights: list[float], classes: int = 3) -> list[dict[str, Any]]:
    """Rows of different lengths that end with eos of tiny_llama; weight 1 is not written."""
    draw = np.random.default_rng(0)
    rows = []
    for index, weight in enumerate(weights):
        ids = [*draw.integers(5, 500, size=4 + 2 * index).tolist(), 2]
        rows.append({"ids": ids, "label": index % classes} | ({} if weight == 1 else {"weight": weight}))
    return rows


def repeated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row as often as it weighs."""
    return [{name: row[name] for name in ("ids", "label")} for row in rows for _ in range(int(row.get("weight", 1)))]


def saved(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights that a run saved."""
    return load_file(Path(path, "model", "model.safetensors"))


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of weights."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# ---- a row of weight 2 is the row twice ----

LAYOUTS = {
    "causal": [(1, 4, 1, "none"), (2, 2, 1, "zero3"), (2, 1, 2, "none"), (4, 1, 1, "zero1")],
    "causal packed": [(1, 1, 4, "zero2"), (2, 2, 1, "zero0"), (4, 1, 1, "zero3")],
    "class": [(1, 4, 1, "zero1"), (2, 2, 1, "zero3"), (4, 1, 1, "none")],
}
"""(ranks, micro, accumulation, stage): 1x4, 2x2 and 4x1 of each kind."""
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "causal": ("CausalLM", tiny_llama, {"packing": False}),
    "causal packed": ("CausalLM", tiny_llama, {"packing": True}),
    "class": ("SequenceClassification", tiny_classifier, {}),
}


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_weight_2_trains_as_the_row_twice(
    one_rank: Ranks, two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    head, model, options = KINDS[kind]
    own, rows = recipe(tmp_path, head), rows_of([2, 1, 3, 1])

    def run(name: str, rows: list[dict[str, Any]], world: int, micro: int, accumulation: int, stage: str) -> dict[str, Any]:
        values = SGD | options | {
            "model_name_or_path": model(), "dataset": write_rows(tmp_path / f"{name}.jsonl", rows), "deepspeed": stage,
            "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation,
            "output_dir": str(tmp_path / f"{name}-{world}-{micro}-{accumulation}-{stage}"),
        }  # fmt: skip
        ranks = {1: one_rank, 2: two_ranks, 4: four_ranks}[world]
        return ranks.run("train", recipe=own, values=values)[0]

    twice = run("repeated", repeated(rows), 1, 7, 1, "none")
    assert twice["step"] == 3
    if kind == "causal packed":
        assert twice["rows"]["train"] < 7
    weights = saved(twice["path"])
    start = run("unweighted", rows_of([1, 1, 1, 1]), 1, 4, 1, "none")
    assert difference(weights, saved(start["path"])) > 1e-4, "the weights make a difference"
    for layout in LAYOUTS[kind]:
        weighted = run("weighted", rows, *layout)
        assert difference(weights, saved(weighted["path"])) <= 1e-6, layout
        losses = [[line["loss"] for line in result["log"] if "loss" in line] for result in (twice, weighted)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), layout


@pytest.mark.parametrize(("head", "model"), [("CausalLM", tiny_llama), ("SequenceClassification", tiny_bert)])
def test_weights_of_one_are_no_weights(tmp_path: Path, head: str, model: Any) -> None:
    rows, own, runs = rows_of([1, 1, 1]), recipe(tmp_path, head), []
    ones = [row | {"weight": 1.0} for row in rows]
    for name, data in (("none", rows), ("ones", ones)):
        recipe_of_rows = load_recipe(
            own, **SGD, model_name_or_path=model(), dataset=write_rows(tmp_path / f"{name}.jsonl", data),
            per_device_train_batch_size=2, output_dir=str(tmp_path / name),
        )  # fmt: skip
        run, result = run_recipe(recipe_of_rows)
        runs.append(result.path)
        assert not run.prepared.sequences["train"].weighted
        assert head == "SequenceClassification" or run.trainer.compute_loss_func is None
    losses = [[line["loss"] for line in read_log(path / "log.jsonl") if "loss" in line] for path in runs]
    assert losses[0] == losses[1] and difference(*map(saved, runs)) == 0


# ---- turns, evaluation and the header ----


def plain_mean(model: Any, rows: list[dict[str, Any]]) -> float:
    """Weighted mean loss of causal rows, one at a time."""
    total = count = 0.0
    for row in rows:
        weights = torch.tensor(row.get("weights") or [row.get("weight", 1.0)] * len(row["ids"]))[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["ids"]])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row["ids"][1:]), reduction="none")
        total, count = total + float((losses * weights).sum()), count + float(weights.sum())
    return total / count


@pytest.mark.parametrize("model", [tiny_llama, lambda: tiny_moe("mixtral")])
def test_loss_of_turns_and_evaluation_are_weighted_means(tmp_path: Path, model: Any, capfd: Any) -> None:
    rows = rows_of([1, 0.5, 1, 2, 1])
    rows[2] |= {"weights": [1.0] * 3 + [0.25] * 3 + [0.0] * 2 + [1.0]}
    held_out = rows_of([3, 1, 0.1])
    result = load_recipe(
        recipe(tmp_path, "CausalLM"), **SGD | {"learning_rate": 0.0, "max_steps": 1}, model_name_or_path=model(),
        dataset=write_rows(tmp_path / "rows.jsonl", rows), eval_dataset=write_rows(tmp_path / "held_out.jsonl", held_out),
        per_device_train_batch_size=2, gradient_accumulation_steps=4, per_device_eval_batch_size=2,
        output_dir=str(tmp_path / "run"),
    ).run()  # fmt: skip
    assert (
        "weights   3 of 5 rows weigh other than 1 (0.25 to 2) · 2 of 3 rows of validation weigh other than 1 (0.1 to 3)"
        in capfd.readouterr().out
    )
    trained = AutoModelForCausalLM.from_pretrained(result.path / "model").eval()
    (line,) = [line for line in read_log(result.path / "log.jsonl") if "loss" in line]
    assert line["loss"] - line.get("router_loss", 0.0) == pytest.approx(plain_mean(trained, rows), abs=1e-5)
    expected = plain_mean(trained, held_out)
    assert expected != pytest.approx(plain_mean(trained, rows_of([1, 1, 1])), abs=1e-3)
    assert result.metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    measured = evaluate(str(result.path), split="validation")
    assert measured["figures"]["loss"] == pytest.approx(expected, abs=1e-5) and measured["weighted"] == 2


def test_a_weight_column_of_questions(tmp_path: Path) -> None:
    """In training and in `evaluate`; a question of weight 0 is in neither."""
    lines = [f"question {n},a,b{n},c,d,{'ABCD'[n % 4]},{weight}" for n, weight in enumerate(["2", "", "0", "0.5", "1"])]
    (tmp_path / "exam.csv").write_text("\n".join(["question,A,B,C,D,Answer,Weight", *lines]))
    data = str(tmp_path / "exam.csv")
    values = SGD | {"max_steps": 1, "model_name_or_path": tiny_bert(), "dataset": data, "eval_dataset": data}
    story = load_recipe("bert_tmmlu_qa", **values, split="official", profile="full", output_dir=str(tmp_path / "run"))
    run, result = run_recipe(story)
    stats = run.prepared.rows.splits["validation"].stats
    assert (stats.kept, stats.weighted, stats.weight_range) == (4, 2, [0.5, 2.0])
    assert stats.dropped == {"nothing to learn from": 1}
    measured = evaluate(str(result.path), split="validation")
    losses, weights = [item["loss"] for item in measured["items"]], [2, 1, 0.5, 1]
    assert measured["figures"]["loss"] == pytest.approx(np.average(losses, weights=weights), abs=1e-6)
    assert result.metrics["eval_loss"] == pytest.approx(measured["figures"]["loss"], abs=1e-5)


# ---- rows to batches ----


def test_weights_have_the_positions_of_their_labels() -> None:
    ids = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]
    labels = [[IGNORE, 2, IGNORE, 4], [IGNORE, 6, 7], [IGNORE, IGNORE, 10, 11]]
    columns = {"input_ids": ids, "labels": labels, WEIGHTS: [[9.0, 0.5, 9.0, 2.0], [], [9.0, 9.0, 0.25, 4.0]]}
    for capacity in (None, 8):
        data = Sequences(arrow_file(columns), capacity)
        items = [data[index] for index in range(len(data))]
        batch = CausalCollator(0, select_logits=True)([*items, data[PADDING_ROW]])
        weight = {2: 0.5, 4: 2, 6: 1, 7: 1, 10: 0.25, 11: 4}
        assert batch[WEIGHTS].tolist() == [weight[label] for label in batch["shift_labels"].tolist()]
        whole = CausalCollator(0, select_logits=False)([*items, data[PADDING_ROW]])
        assert whole[WEIGHTS].shape == whole["shift_labels"].shape and whole[WEIGHTS].sum() == batch[WEIGHTS].sum()
        assert CausalCollator(0, select_logits=True)([data[PADDING_ROW]])[WEIGHTS].shape == (0,)
    plain = Sequences(arrow_file(columns | {WEIGHTS: [[], [], []]}))
    assert not plain.weighted and WEIGHTS not in CausalCollator(0, select_logits=True)([plain[0]])


def test_a_class_multiplies_the_weight_of_its_rows() -> None:
    columns = {"input_ids": [[1, 2], [3], [4]], "labels": [0, 2, 2], WEIGHTS: [1.0, 0.5, 2.0]}
    data = Sequences(arrow_file(columns), class_weights=np.array([3, 1, 4], np.float32))
    batch = PaddingCollator(0)([data[0], data[1], data[2], data[PADDING_ROW]])
    assert batch[WEIGHTS].tolist() == [3, 2, 8, 0]
    del columns[WEIGHTS]
    assert not Sequences(arrow_file(columns), class_weights=np.array([1, 5, 1], np.float32)).weighted


def test_labels_of_weight_0_are_no_labels_and_ones_cost_nothing() -> None:
    batch = {"labels": [[IGNORE, 5, 6, 7], [IGNORE, 5], [IGNORE, 8]], WEIGHTS: [[0, 1, 0, 1], [9, 1], [1, 3]]}
    normalize_weights(batch)
    assert batch == {"labels": [[IGNORE, 5, IGNORE, 7], [IGNORE, 5], [IGNORE, 8]], WEIGHTS: [[], [], [0, 3]]}
    with pytest.raises(UserError, match="2 labels and 1 weights.*DSR104"):
        normalize_weights({"labels": [[1, 2]], WEIGHTS: [[1.0]]})


def test_rows_that_differ_in_weight_alone_are_equal() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    weighted = [turns[0], turns[1] | {"weight": 0.5}]
    assert record_hash({"messages": turns}) == record_hash({"messages": weighted, "weight": 2.0})
    assert record_hash({"text": "a"}) != record_hash({"text": "b"})


@pytest.mark.parametrize("value", [-1, "x", float("nan"), float("inf"), [1], {}, "1e39", 10**400])
def test_values_that_are_no_weights(value: Any) -> None:
    with pytest.raises(ValueError, match="'weight' must be a weight .* found"):
        row_weight({"weight": value})
    assert (row_weight({}), row_weight({"weight": ""}), row_weight({"weight": "2.5"})) == ({}, {}, {"weight": 2.5})
    assert [as_weight(value) for value in (None, " ", True, "FALSE", False, "2")] == [1, 1, 1, 0, 0, 2]


# ---- classes ----


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        (["1", "5", "2"], [1, 5, 2]), (["1,5,2"], [1, 5, 2]), (["[1, 5, 2]"], [1, 5, 2]), (["0=1,2=5"], [1, 1, 5]),
        (["very bad=0.5", "good=0"], [0.5, 1, 0]), (["0=0"], [0, 1, 1]), (['{"good": 3, "1": 2}'], [1, 2, 3]),
    ],
)  # fmt: skip
def test_forms_of_class_weights(words: list[str], weights: list[float]) -> None:
    assert class_weights(words, np.array([0, 1, 1, 2]), ["very bad", "so-so", "good"]).tolist() == weights


def test_balanced_is_rows_over_classes_times_count() -> None:
    labels = np.random.default_rng(0).choice(4, size=200, p=[0.7, 0.2, 0.1, 0])
    weights = class_weights(["balanced"], labels, list("abcd"))
    expected = [200 / (3 * int((labels == index).sum())) for index in range(3)]
    assert weights[:3] == pytest.approx(expected, rel=1e-6) and weights[3] == 1
    # each class has the same total weight
    assert [weights[index] * (labels == index).sum() for index in range(3)] == pytest.approx([200 / 3] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1", "-2"], "true or false), found '-2'"), (["0", "0", "0"], "no class would be trained on"), (["x"], "found 'x'"),
        (["0=1", "5"], "all by name or all in order"), (["0=1", "0=2"], "one weight"), (["{0: 1}"], "not JSON"),
        (["a="], "give numbers by class"), (["{}"], "no class would be trained on"),
    ],
)  # fmt: skip
def test_class_weights_that_mean_nothing(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match="^--class_weights .*DSR063") as error:
        parse_class_weights(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "labels", "message"),
    [
        (["1", "2"], [0, 1, 2], "has 2 numbers for 3 classes: bad, so-so, good [DSR171]"),
        (["goof=2"], [0, 1, 2], "(did you mean good?); the classes are 0 (bad), 1 (so-so), 2 (good) [DSR174]"),
        (["3=2"], [0, 1, 2], "DSR174"), (["bad=1,0=2"], [0, 1, 2], "DSR172"),
        (["good=5,bad=0"], [0, 0], "DSR173"), (["balanced"], [0.5, 1.5], "DSR170"),
        (["balanced"], [[0, 1], [1, 1]], "DSR170"),
    ],
)  # fmt: skip
def test_class_weights_that_do_not_fit(words: list[str], labels: list, message: str) -> None:
    with pytest.raises(UserError) as error:
        class_weights(words, np.array(labels), ["bad", "so-so", "good"])
    assert message in str(error.value)


@pytest.mark.ranks
def test_class_weights_train_as_cross_entropy_loss_with_weight(two_ranks: Ranks, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(tiny_classifier())
    rows, held_out = rows_of([1] * 7), rows_of([1] * 5)
    values = SGD | {
        "model_name_or_path": tiny_classifier(), "class_weights": {"LABEL_0": 0.3, 1: 4}, "deepspeed": "zero2",
        "dataset": write_rows(tmp_path / "rows.jsonl", rows), "eval_dataset": write_rows(tmp_path / "held_out.jsonl", held_out),
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    run = two_ranks.run("train", recipe=recipe(tmp_path, "SequenceClassification"), values=values)[0]
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([0.3, 4, 1]))

    def plain_loss(rows: list[dict[str, Any]]) -> torch.Tensor:
        logits = torch.cat([model(torch.tensor([row["ids"]])).logits for row in rows])
        return loss(logits, torch.tensor([row["label"] for row in rows]))

    model.eval()  # it has no dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(plain_loss(rows))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert [line["loss"] for line in run["log"] if "loss" in line] == pytest.approx(
        [loss.item() for loss in losses], abs=1e-6
    )
    assert difference(saved(run["path"]), {name: tensor.detach() for name, tensor in model.state_dict().items()}) <= 1e-6
    assert run["metrics"]["eval_loss"] == pytest.approx(plain_loss(held_out).item(), abs=1e-6)


def test_a_classifier_with_balanced_classes_is_evaluated_as_it_trains(tmp_path: Path, capfd: Any) -> None:
    texts = ["rain", "rain again", "sun", "rain now", "more rain", "sun and rain"]
    rows = [{"text": text, "label": "dry" if "sun" in text else "wet", "weight": 1 + n % 2} for n, text in enumerate(texts)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    values = SGD | {"dataset": data, "eval_dataset": data, "model_name_or_path": tiny_classifier(), "profile": "full"}
    result = load_recipe("seq_classification", **values, class_weights="balanced", output_dir=str(tmp_path / "run")).run()
    line = "weights   3 of 6 rows weigh other than 1 (2) · 3 of 6 rows of validation weigh other than 1 (2) · classes dry 1.5, wet 0.75"
    assert line in capfd.readouterr().out
    measured = evaluate(str(result.path), split="validation")
    weights = [(1 + n % 2) * (1.5 if "sun" in text else 0.75) for n, text in enumerate(texts)]
    expected = np.average([item["loss"] for item in measured["items"]], weights=weights)
    assert measured["figures"]["loss"] == pytest.approx(expected, abs=1e-6)
    assert result.metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_losses_of_labels_are_compared_with_their_weights() -> None:
    items = [{"key": "a", "loss": 1.0, "tokens": 1, "weight": 3.0}, {"key": "b", "loss": 2.0, "tokens": 1}]
    result = {"run": "run", "weights": "base", "task": "labels", "rows": 2, "items": items}
    assert pair(result, result)["differences"]["loss"]["first"] == pytest.approx((3 * 1.0 + 2.0) / 4)


def test_a_step_of_weight_0_has_no_gradient_and_class_weights_are_a_term_of_the_run(tmp_path: Path, capfd: Any) -> None:
    rows = [{"ids": [5, 6, 7 + n], "label": int(n == 0)} for n in range(4)]
    values = SGD | {
        "model_name_or_path": tiny_bert(), "dataset": write_rows(tmp_path / "rows.jsonl", rows), "max_steps": 4,
        "train_sampling_strategy": "sequential", "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2,
        "global_batch_size": 1, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    own = recipe(tmp_path, "SequenceClassification")
    result = load_recipe(own, **values, class_weights=[0, 5]).run()
    losses = [line["loss"] for line in read_log(result.path / "log.jsonl") if "loss" in line]
    assert losses[0] > 0 and losses[1:] == [0, 0, 0]
    assert "weights   classes LABEL_0 0, LABEL_1 5 · losses are weighted means" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"class_weights is \[0.0, 5.0\] there and \[1.0, 5.0\] here.*DSR376"):
        load_recipe(own, **values | {"max_steps": 4}, class_weights=[1, 5], resume_from_checkpoint="auto").run()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("alpaca_llama_sft", ["balanced"], "alpaca_llama_sft has no classes, but tokens"),
        ("bert_tmmlu_qa", ["1", "2", "3", "4"], "bert_tmmlu_qa has no classes, but options"),
        ("bert_tmmlu_qa", ["1", "-2"], "must be a weight (a number of 0 or more, true or false), found '-2'"),
    ],
)
def test_recipes_without_classes(name: str, words: list[str], message: str, capfd: Any) -> None:
    said = refusal(main, ["--recipe", name, "--profile", "starter", "--class_weights", *words], capfd)
    assert "--class_weights" in said and message in said


def test_a_collator_without_weights_is_refused(tmp_path: Path) -> None:
    own = recipe(tmp_path, "CausalLM")
    text = Path(own).read_text() + (
        "\n    def collator(self, model, tokenizer):\n        collate = super().collator(model, tokenizer)\n"
        "        return lambda items: {name: value for name, value in collate(items).items() if name != 'weights'}\n"
    )
    Path(own).write_text(text)
    with pytest.raises(UserError, match="the rows have weights, which the recipe's collator leaves out"):
        load_recipe(
            own, **SGD, model_name_or_path=tiny_llama(), dataset=write_rows(tmp_path / "rows.jsonl", rows_of([2, 1])),
            output_dir=str(tmp_path / "run"),
        ).run()  # fmt: skip
