"""seq_classification: what rows and labels become, figures equal to scikit-learn's, padding, heads beside an adapter."""

import functools
import json
import random
import re
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from dsrecipes.recipes.seq_classification import SeqClassification
from safetensors.torch import load_file
from scipy import stats
from sklearn import metrics
from support.finished_runs import made_run
from support.tiny import STARTER, _saved, arrow_file, refusal, run_recipe, tiny_bert, tiny_gpt2, tiny_llama, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig, RobertaForMaskedLM, set_seed

from dsrecipes import UserError, load_recipe
from dsrecipes.cli import main
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.collate import TOKEN_COUNTS, PaddingCollator
from dsrecipes.data.labels import NUMBER, ONE, SEVERAL, kind_and_names, target
from dsrecipes.data.sequences import PADDING_ROW, Sequences
from dsrecipes.evaluation.evaluate import evaluate
from dsrecipes.evaluation.rows import EvaluationRows
from dsrecipes.inference.chat import chat
from dsrecipes.inference.finished import open_run
from dsrecipes.inference.labels import logits_of_rows
from dsrecipes.model.loss import row_loss
from dsrecipes.publish.export import export
from dsrecipes.publish.verify import verify

WORDS = "rain sun train ball soup road team rice".split()
VALUES = {
    "profile": "full", "use_cpu": True, "deepspeed": "none", "max_length": 64, "learning_rate": 1e-2, "warmup_steps": 0,
    "weight_decay": 0.0, "validation_split": 0.25, "verify_model": False, "disable_tqdm": True, "logging_steps": 1,
    "eval_strategy": "no", "save_strategy": "no", "global_batch_size": 4, "hang_timeout": 300,
}  # fmt: skip


def label_of(kind, number, words):
    """A label that follows from the text, so that there is something to learn."""
    return {
        "two": lambda: "wet" if "rain" in words else "dry",
        "three": lambda: ["b", "a", "c"][number % 3],
        "several": lambda: [word for word in ("sun", "rain", "team") if word in words],
        "vectors": lambda: [int("rain" in words), int("sun" in words)],
        "number": lambda: words.count("rain") - 0.5 * len(words),
    }[kind]()


def rows_of(kind, count=26):
    draw = random.Random(7)
    texts = [[draw.choice(WORDS) for _ in range(draw.randint(1, 9))] for _ in range(count)]
    return [{"text": " ".join(words), "label": label_of(kind, number, words)} for number, words in enumerate(texts)]


def train(folder, kind, model, **values):
    """A finished run of a kind of label."""
    rows = write_rows(folder / f"{kind}.jsonl", rows_of(kind))
    paths = {"dataset": rows, "model_name_or_path": model, "output_dir": str(folder / "run")}
    return load_recipe("seq_classification", **VALUES | {"max_steps": 4} | paths | values).run()


@functools.cache
def tiny_roberta():
    """A folder with an encoder whose head has two layers."""
    config = RobertaConfig(
        vocab_size=2161, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, pad_token_id=0,
        max_position_embeddings=130, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    set_seed(0)
    return _saved("roberta", RobertaForMaskedLM(config), AutoTokenizer.from_pretrained(STARTER / "bert"))


# ---- rows and labels ----


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"Text": "a", "Label": "x "}, {"text": "a", "label": "x"}),
        ({"idx": 0, "sentence": "a", "label": 1}, {"text": "a", "label": 1}),
        ({"premise": "a", "hypothesis": "b", "label": None}, {"text": "a", "text_pair": "b", "label": None}),
        ({"question": "a", "answer": "b", "labels": ["x", 2]}, {"text": "a", "text_pair": "b", "label": ["x", 2]}),
        ({"review": "a", "stars": "4.5", "weight": "2"}, {"text": "a", "label": "4.5", "weight": 2.0}),
        ({"text": "a", "label": '["x", "y"]'}, {"text": "a", "label": ["x", "y"]}),
        ({"text": "a", "label": True}, {"text": "a", "label": "true"}),
        ({"text": 5, "label": float("nan")}, {"text": "5", "label": None}),
        ({"text": "a", "label": []}, {"text": "a", "label": []}),
    ],
)
def test_a_row_becomes_texts_and_a_label(row, record):
    assert SeqClassification.format_row(row) == record


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"label": 1}, "no text column: expected one of text, sentence"),
        ({"text": "a", "mood": 1}, "no label column: expected one of label, labels"),
        ({"text": " ", "label": 1}, "field 'text' is empty"),
        ({"text": None, "label": 1}, "field 'text' must be text, found NoneType"),
        ({"text": "a", "label": {"x": 1}}, "must be a class, a number or a list of classes, found dict"),
        ({"text": "a", "label": [["x"]]}, "must be a class, a number or a list of classes, found list"),
        ({"text": float("nan"), "label": 1}, "field 'text' must be text, found nan"),
        ({"text": "a\ud800", "label": 1}, "field 'text' holds half of a surrogate pair"),
        ({"text": "a", "label": "\ud800"}, "field 'label' holds half of a surrogate pair"),
        ({"text": "a", "label": float("inf")}, "inf is no label"),
        ({"text": "a", "label": 1, "weight": -1}, "field 'weight' must be a weight"),
    ],
)
def test_a_wrong_row_says_which_field(row, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        SeqClassification.format_row(row)


@pytest.mark.parametrize(
    ("values", "asked", "kind", "names"),
    [
        (["pos", "neg"], "auto", ONE, ["neg", "pos"]),
        (["10", "9", "0"], "auto", ONE, ["0", "9", "10"]),
        ([1, "0", 1], "auto", ONE, ["0", "1"]),
        ([-1, 1], "auto", ONE, ["-1", "1"]),
        ([1.5, 2, 3.0], "auto", NUMBER, ["LABEL_0"]),
        (["1.5", "2"], NUMBER, NUMBER, ["LABEL_0"]),
        ([1.0, 2.0], ONE, ONE, ["1", "2"]),
        ([["b"], ["a", "b"], []], "auto", SEVERAL, ["a", "b"]),
        ([[0, 1], [1, 1]], "auto", SEVERAL, ["LABEL_0", "LABEL_1"]),
        ([[0], [0, 1]], "auto", SEVERAL, ["0", "1"]),
        (["a|b", "b;c", "c, a"], SEVERAL, SEVERAL, ["a", "b", "c"]),
    ],
)
def test_the_training_labels_decide_the_kind(values, asked, kind, names):
    assert kind_and_names(values, asked) == (kind, names)


@pytest.mark.parametrize(
    ("values", "asked", "problem"),
    [
        ([1.0, 2.0], "auto", "could be numbers or classes: give --problem_type regression or single_label_classification"),
        (["1.5", "2"], "auto", "could be numbers or classes"),
        (["x"], "auto", "all training labels are x"),
        ([[]], "auto", "all training labels are empty"),
        ([["a"], "b"], ONE, "a label is a list (['a'])"),
    ],
)
def test_labels_that_leave_it_open_are_refused(values, asked, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        kind_and_names(values, asked)


@pytest.mark.parametrize(
    ("values", "targets"),
    [
        ([["LABEL_0"], ["LABEL_0", "spam"], []], [[1, 0], [1, 1], [0, 0]]),
        ([["LABEL_1"], ["LABEL_0", "LABEL_1"], []], [[0, 1], [1, 1], [0, 0]]),
        (["LABEL_0|LABEL_2", "LABEL_2"], [[1, 1], [0, 1]]),
    ],
)
def test_classes_that_are_called_label_0_are_classes(values, targets):
    kind, names = kind_and_names(values, SEVERAL)
    assert [target(value, kind, names) for value in values] == targets
    with pytest.raises(ValueError, match="none of the training labels"):
        target(["LABEL_9"], kind, names)


def test_targets():
    assert target("b", ONE, ["a", "b"]) == 1 and target(2.0, ONE, ["1", "2"]) == 1
    assert target(["b", "a"], SEVERAL, ["a", "b", "c"]) == [1, 1, 0] and target("c", SEVERAL, ["a", "b", "c"]) == [0, 0, 1]
    assert target([0, 1], SEVERAL, ["LABEL_0", "LABEL_1"]) == [0, 1] and target("2.5", NUMBER, ["LABEL_0"]) == 2.5
    for value, kind, names in (([1], SEVERAL, ["LABEL_0", "LABEL_1"]), ("x", NUMBER, ["LABEL_0"]), ("z", ONE, ["a", "b"])):
        with pytest.raises(ValueError, match="label"):
            target(value, kind, names)


@pytest.mark.parametrize(("model", "between"), [(tiny_bert, "[SEP]"), (tiny_gpt2, "\n"), (tiny_llama, "\n")])
def test_texts_are_cut_and_pairs_are_kept_apart(model, between):
    tokenizer = AutoTokenizer.from_pretrained(model())
    records = [{"text": "ab", "text_pair": "cd", "label": 1}, {"text": "long " * 40, "text_pair": "b", "label": None}]
    batch = SeqClassification.encode(records, tokenizer, EncodeOptions(16, "alpaca"))
    assert batch["labels"] == ["1", []] and batch["cut"] == [0, 1] and batch["weights"] == [1.0, 1.0]
    first, second = batch["input_ids"]
    text = tokenizer.decode(first)
    assert re.search(f"a ?b ?{re.escape(between)} ?c ?d", text) and len(second) == 16, text


def test_classes_of_a_hub_data_set_keep_their_names(tmp_path, monkeypatch):
    features = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive"])
    )
    train_rows = {"sentence": ["bad", "good", "so", "so so"] * 3, "label": [0, 1, -1, 1] * 3}
    splits = {
        "train": datasets.Dataset.from_dict(train_rows, features=features),
        "test": datasets.Dataset.from_dict({"sentence": ["a"], "label": [-1]}, features=features),
    }
    monkeypatch.setattr("dsrecipes.base.load_splits", lambda *_: splits)  # no hub here: this is what it gives
    values = VALUES | {"dataset": "stanfordnlp/sst2", "model_name_or_path": tiny_bert(), "dry_run": True}
    prepared = run_recipe(load_recipe("seq_classification", **values, output_dir=str(tmp_path / "run")))[0].prepared
    splits = prepared.rows.splits
    assert prepared.model_config.id2label == {0: "negative", 1: "positive"}
    assert splits["train"].stats.kept + splits["validation"].stats.kept == 9 and "test" not in splits
    assert "the test rows have no labels: the split is left out" in prepared.setup.notes


def test_other_names_of_columns(tmp_path, monkeypatch, capfd):
    (tmp_path / "a.csv").write_text("id,body,sentence,mood\n1,rain,x,bad\n2,sun,y,good\n")
    features = datasets.Features(body=datasets.Value("string"), mood=datasets.ClassLabel(names=["bad", "good"]))
    hub = {"train": datasets.Dataset.from_dict({"body": ["rain", "sun"], "mood": [0, 1]}, features=features)}
    values = VALUES | {"model_name_or_path": tiny_bert(), "dry_run": True, "validation_split": 0}
    values |= {"columns": ["text=body", "label=mood"], "output_dir": str(tmp_path / "run"), "prompt_style": "chat"}
    load_recipe("seq_classification", **values | {"dataset": str(tmp_path / "a.csv")}).run()
    out = capfd.readouterr().out
    assert "[CLS] rain [SEP]" in out and "label: bad" in out and "unused columns: id, sentence" in out, out
    assert "prompt_style has no effect: the recipe seq_classification does not use it (python)" in out
    monkeypatch.setattr("dsrecipes.base.load_splits", lambda *_: hub)
    run, _ = run_recipe(load_recipe("seq_classification", **values | {"dataset": "some/set"}))
    assert run.prepared.model_config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize(
    ("files", "values", "parts"),
    [
        (
            {"train.csv": "text,label\na,x\nb,y\n", "test.csv": "text,label\nc,x\nd,z\n"},
            {},
            ["test.csv, line 3", "'z'", "x, y"],
        ),
        ({"train.csv": "text,label\na,1.5\nb,2\n"}, {}, ["--problem_type regression"]),
        ({"train.csv": "text,label\na,1.5\nb,soon\n"}, {"problem_type": "regression"}, ["train.csv, line 3", "'soon'"]),
        ({"train.csv": "text,label\na,1\nb\n"}, {}, ["train.csv, line 3"]),
        ({"train.csv": "text,label\na,x\nb,x\n"}, {}, ["all training labels are x"]),
        (
            {"train.csv": "text,label\na,x\nb,y\n"},
            {"problem_type": "several"},
            ["problem_type", "multi_label_classification"],
        ),
    ],
)
def test_a_command_that_cannot_work(files, values, parts, tmp_path, capfd):
    for name, text in files.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text(text)
    flags = VALUES | {"validation_split": 0, "model_name_or_path": tiny_bert(), "dataset": tmp_path / "data"} | values
    argv = ["train", "seq_classification", *(f"--{key}={value}" for key, value in flags.items())]
    message = refusal(main, argv, capfd)
    assert all(part in message for part in parts), message


def test_a_rare_class_may_be_held_out(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"text {n}", "label": n} for n in range(8)])
    values = VALUES | {"dataset": rows, "model_name_or_path": tiny_bert(), "dry_run": True}
    run, _ = run_recipe(load_recipe("seq_classification", **values, output_dir=str(tmp_path / "run")))
    assert run.prepared.model_config.num_labels == 8


def test_several_data_sets_have_the_same_labels(tmp_path):
    files = [write_rows(tmp_path / f"{name}.jsonl", rows_of("three", count)) for name, count in (("a", 12), ("b", 18))]
    values = VALUES | {"model_name_or_path": tiny_bert(), "max_steps": 2, "output_dir": str(tmp_path / "run")}
    result = load_recipe("seq_classification", **values | {"dataset": files, "class_weights": "balanced"}).run()
    assert {"eval_macro_f1", "eval_a_loss", "eval_b_loss"} <= result.metrics.keys()
    measured = evaluate(str(result.path), split="validation")
    assert measured["rows"] == 8
    assert measured["figures"]["loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-5)  # with the class weights
    other = write_rows(tmp_path / "other.jsonl", rows_of("two"))
    with pytest.raises(UserError, match=r"different labels \(single_label_classification of a, b, c and .* of dry, wet\)"):
        load_recipe("seq_classification", **values | {"dataset": [files[0], other], "dry_run": True}).run()


def test_the_starter_s_rows(capfd, tmp_path):
    argv = [
        "train",
        "seq_classification",
        "--profile",
        "starter",
        "--use_cpu",
        "--dry_run",
        "--model_name_or_path",
        tiny_bert(),
    ]
    assert main(argv) == 0
    out = capfd.readouterr().out
    assert "label: food" in out and "one label a row, of 4 classes: food, sports, transport, weather" in out
    rows = json.loads((STARTER / "data" / "topics.json").read_text("utf-8"))
    assert len(rows) == len({row["text"] for row in rows}) == 240


# ---- the loss ----


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([2, 0, -100]), lambda x: torch.nn.functional.cross_entropy(x[:2], torch.tensor([2, 0]))),
        (
            torch.tensor([[1.0, 0, 1], [0, 0, 1], [torch.nan] * 3]),
            lambda x: torch.nn.functional.binary_cross_entropy_with_logits(x[:2], torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
        ),
        (
            torch.tensor([0.5, -100.0, torch.nan]),
            lambda x: torch.nn.functional.mse_loss(x[:2, 0], torch.tensor([0.5, -100.0])),
        ),
    ],
)
def test_the_loss_of_each_kind_leaves_fillers_out(labels, expected):
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = row_loss(SimpleNamespace(logits=logits), labels, torch.tensor(2))
    torch.testing.assert_close(loss, expected(logits))
    loss.backward()
    assert logits.grad.isfinite().all() and not logits.grad[2].any() and logits.grad[:2].any()


@pytest.mark.parametrize("label", [1, 2.5, [1.0, 0.0]])
def test_a_filler_of_each_kind(label, tmp_path):
    data = Sequences(arrow_file({"input_ids": [[1, 2, 3], [4]], "labels": [label, label]}))
    batch = PaddingCollator(0)([data[0], data[1], data[PADDING_ROW]])
    assert batch[TOKEN_COUNTS].tolist() == [4, 2] and batch["attention_mask"].tolist()[1] == [1, 0, 0]
    assert batch["labels"].is_floating_point() == (not isinstance(label, int))
    np.testing.assert_allclose(batch["labels"][0], label)


# ---- whole runs ----

KINDS = {
    "two": (tiny_gpt2, {}),
    "three": (tiny_llama, {"lora_r": 4}),
    "several": (tiny_bert, {}),
    "number": (tiny_gpt2, {"lora_r": 4}),
}
"""Kind of label -> a model without a padding token or an encoder, and flags."""


def expected_figures(kind, logits, labels):
    """What scikit-learn and scipy give for all rows at once."""
    if kind == "number":
        values = logits[:, 0]
        return {
            "pearson": stats.pearsonr(labels, values).statistic,
            "spearman": stats.spearmanr(labels, values).statistic,
            "mse": metrics.mean_squared_error(labels, values),
        }
    if kind in ("several", "vectors"):
        predicted = (logits > 0).astype(int)
        return {
            "macro_f1": metrics.f1_score(labels, predicted, average="macro", zero_division=0),
            "micro_f1": metrics.f1_score(labels, predicted, average="micro", zero_division=0),
            "auc": metrics.roc_auc_score(labels, logits, average="macro"),
            "accuracy": metrics.accuracy_score(labels, predicted),
        }
    predicted = logits.argmax(-1)
    figures = {
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "matthews": metrics.matthews_corrcoef(labels, predicted),
        "accuracy": metrics.accuracy_score(labels, predicted),
    }
    if kind == "two":
        figures["auc"] = metrics.roc_auc_score(labels, np.exp(logits[:, 1]) / np.exp(logits).sum(-1))
    return figures


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_scikit_learn_s_on_one_and_two_ranks(kind, one_rank, two_ranks, tmp_path):
    """The same steps on micro batches of 4, of 1, and of 1 on two ranks; then each row measured by itself."""
    model, changed = KINDS[kind]
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(kind))
    layouts = [(one_rank, 4, "none"), (one_rank, 1, "none"), (two_ranks, 1, "zero2")]
    done = []
    for number, (ranks, micro, engine) in enumerate(layouts):
        values = {
            "dataset": rows, "model_name_or_path": model(), "output_dir": str(tmp_path / str(number)), "num_train_epochs": 1,
            "per_device_train_batch_size": micro, "per_device_eval_batch_size": 1 + 2 * micro, "optim": "sgd",
            "deepspeed": engine, "eval_strategy": "epoch", "audit": engine == "none",  # which expects states of an optimizer
        }  # fmt: skip
        done.append(ranks.run("train", recipe="seq_classification", values=VALUES | changed | values)[0])
    first = done[0]
    losses = [[line["loss"] for line in facts["log"] if "loss" in line] for facts in done]
    norms = [[line["grad_norm"] for line in facts["log"] if "grad_norm" in line] for facts in done]
    for other, norm in zip(losses, norms, strict=True):
        assert other == pytest.approx(losses[0], abs=2e-6, rel=2e-6) and norm == pytest.approx(norms[0], rel=2e-5)
    result = evaluate(first["path"], batch_size=1)
    logits, labels = (np.array([item[name] for item in result["items"]]) for name in ("logits", "target"))
    for name, value in expected_figures(kind, logits, labels).items():
        assert result["figures"][name] == pytest.approx(value, abs=1e-6), name
        for facts in done:
            assert facts["metrics"][f"eval_{name}"] == pytest.approx(value, abs=2e-4 if kind == "number" else 1e-6), name
    assert first["metrics"]["eval_loss"] == pytest.approx(result["figures"]["loss"], abs=1e-5)


@pytest.mark.parametrize("model", [tiny_gpt2, tiny_llama, tiny_bert])
def test_padding_changes_no_logits(model, tmp_path):
    run = open_run(str(train(tmp_path, "three", model(), max_steps=1).path))
    loaded = run.load()
    records = [SeqClassification.format_row(row) for row in rows_of("three", 9)]
    alone = dict(logits_of_rows(run, loaded, records, 1))
    together = dict(logits_of_rows(run, loaded, records, 9))
    for index, logits in alone.items():
        torch.testing.assert_close(together[index], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", [tiny_roberta, tiny_llama])
def test_the_head_is_saved_beside_the_adapter(model, tmp_path, capfd):
    result = train(tmp_path, "three", model(), lora_r=4, max_steps=3, save_strategy="steps", save_steps=3)
    saved = result.path / "model"
    tensors = load_file(saved / "adapter_model.safetensors")
    head = "classifier.out_proj.weight" if model is tiny_roberta else "score.weight"
    assert tensors[f"base_model.model.{head}"].shape == (3, 32)
    assert json.loads((saved / "head_config.json").read_text())["names"] == ["a", "b", "c"]
    assert verify(str(result.path))["largest_difference"] < 1e-5

    figures = evaluate(str(result.path))["figures"]
    assert {"macro_f1", "matthews", "accuracy"} <= figures.keys() and sum(map(sum, figures["confusion"])) == 6
    (answered,) = chat(str(result.path), ["rain and rain"])
    assert answered["predicted"] in "abc" and sum(answered["probabilities"].values()) == pytest.approx(1)

    export(str(result.path), tmp_path / "exported")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"} and merged.config.problem_type == ONE
    inputs = AutoTokenizer.from_pretrained(tmp_path / "exported")("rain and rain", return_tensors="pt")
    shares = merged.eval()(**inputs).logits.softmax(-1)[0].tolist()
    assert shares == pytest.approx(list(answered["probabilities"].values()), abs=1e-5)

    again = train(tmp_path, "three", str(saved), max_steps=1, learning_rate=0.0, output_dir=str(tmp_path / "again"))
    weights = load_file(again.path / "model" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    (saved / "head_config.json").write_text("{}")
    assert "head_config.json is damaged" in refusal(main, ["evaluate", result.path], capfd)


def test_other_rows_under_the_run_s_names_or_the_recipe_s(tmp_path):
    folder = made_run(tmp_path / "run", "seq_classification", tiny_bert(), columns={"text": "body", "label": "mood"})
    run = open_run(str(folder))
    for row in ({"body": "rain", "mood": "bad"}, {"text": "rain", "label": "bad"}):
        path = tmp_path / "other.json"
        path.write_text(json.dumps({"test": [row]}))
        assert [item.record for item in EvaluationRows(run, str(path)).items("test")] == [{"text": "rain", "label": "bad"}]
    path.write_text(json.dumps({"test": [{"text": "rain", "label": None}]}))
    with pytest.raises(UserError, match="other.json: none of its rows has a label"):
        EvaluationRows(run, str(path)).choose(None)


def test_commands_on_a_finished_run(tmp_path, capfd):
    result = train(tmp_path, "several", tiny_bert())
    message = refusal(main, ["generate", result.path, "--prompts", tmp_path / "several.jsonl"], capfd)
    assert "this model does not write text; it gives a text its label" in message
    assert "classifier" in refusal(main, ["chat", result.path, "--web"], capfd)
    assert "--task labels" in refusal(main, ["evaluate", result.path, "--task", "choices"], capfd)
    assert main(["evaluate", str(result.path), "--split", "train", "--limit", "4"]) == 0
    out = capfd.readouterr().out
    assert "macro_f1" in out and re.search(r"^rain +\d\.\d+", out, re.MULTILINE)
    assert main(["compare", str(result.path)]) == 0
    assert main(["report", str(result.path)]) == 0
    shutil.copy(tmp_path / "several.jsonl", tmp_path / "other.jsonl")
    with (tmp_path / "other.jsonl").open("a") as file:
        file.write('\n{"text": "x", "label": ["snow"]}')
    assert "other.jsonl, line 27: label 'snow'" in refusal(
        main, ["evaluate", result.path, "--dataset", tmp_path / "other.jsonl"], capfd
    )
    with pytest.raises(UserError, match="takes no system text"):
        chat(str(result.path), ["a"], system="b")
