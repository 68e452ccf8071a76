"""bert_tmmlu_qa: rows, the pooled split, subjects and groups, accuracy beside what guessing reaches."""

import csv
import json
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from dsrecipes.recipes.bert_tmmlu_qa import BertTmmluQa
from support.tiny import SHARED, STARTER, needs_shared, refusal, run_recipe, tiny_bert
from transformers import AutoModelForMultipleChoice, AutoTokenizer, EvalPrediction

from dsrecipes import load_recipe
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.questions import GROUPS, SUBJECTS, pool, subject_of, wanted_subjects
from dsrecipes.data.row import located
from dsrecipes.data.usage import ColumnUsage
from dsrecipes.errors import UserError
from dsrecipes.evaluation.choice_scores import accuracy
from dsrecipes.run import main

ROW = {"question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}


def write_subject(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def recipe(**values):
    base = {"profile": "starter", "use_cpu": True, "deepspeed": "none", "model_name_or_path": tiny_bert(), "max_length": 64}
    return load_recipe("bert_tmmlu_qa", **base | values)


def questions(splits):
    """split -> its questions, normalised."""
    return {
        name: [
            re.sub(r"\s+", "", unicodedata.normalize("NFKC", row.get("question") or row["Question"])).casefold()
            for row in rows
        ]
        for name, rows in splits.items()
    }


def test_a_row_becomes_a_question_of_four_options():
    expected = {"question": "1+1?", "options": ["1", "2", "3", "4"], "answer": 1, "subject": "math"}
    assert BertTmmluQa.format_row({**ROW, "subject": "math"}) == expected
    cmmlu = {"": "0", "Question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "Ｂ ", "subject": "math"}
    assert BertTmmluQa.format_row(cmmlu) == expected
    assert BertTmmluQa.format_row({**ROW, "A": 1, "B": 2.5})["options"][:2] == ["1", "2.5"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"answer": "E"}, "'answer' must be A, B, C or D, found 'E'"), ({"answer": ""}, "must be A, B, C or D"),
     ({"C": None}, "field 'c' is missing"), ({"question": " "}, "field 'question' is empty"),
     ({"D": ["4"]}, "field 'd' must be text, found list"), ({"A": True}, "field 'a' must be text, found bool")],
)  # fmt: skip
def test_a_wrong_row_says_which_field(change, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        BertTmmluQa.format_row({**ROW, **change})


def test_four_pairs_a_record_and_the_longer_part_is_cut():
    tokenizer = AutoTokenizer.from_pretrained(STARTER / "bert")
    records = [BertTmmluQa.format_row({**ROW, "question": "水" * count, "subject": "s"}) for count in (3, 100)]
    batch = BertTmmluQa.encode(records, tokenizer, EncodeOptions(32, "alpaca"))
    assert (
        [len(texts) for texts in batch["input_ids"]] == [4, 4]
        and batch["labels"] == [1, 1]
        and batch["subject"] == ["s", "s"]
    )
    assert max(len(text) for texts in batch["input_ids"] for text in texts) == 32
    for texts in batch["input_ids"]:
        for text, option in zip(texts, "1234", strict=True):
            assert text[0] == tokenizer.cls_token_id and text.count(tokenizer.sep_token_id) == 2
            assert tokenizer.decode(text[text.index(tokenizer.sep_token_id) + 1 : -1]) == option
    assert batch["token_type_ids"][0][0][-2:] == [1, 1]


@pytest.mark.parametrize("sizes", [[100], [6] * 40, [1, 2, 3, 50, 7], [20, 20, 21]])
def test_pooled_rows_are_split_70_25_5(sizes):
    rows = [
        (f"row {s} {n}", {"subject": f"s{s}", "question": f"question {s} {n}"})
        for s, size in enumerate(sizes)
        for n in range(size)
    ]
    splits = pool(rows, 1)
    total = sum(sizes)
    for name, share in (("train", 0.7), ("validation", 0.25), ("test", 0.05)):
        assert abs(len(splits[name]) - share * total) <= 1
        for s, size in enumerate(sizes):
            assert abs(sum(row["subject"] == f"s{s}" for _, row in splits[name]) - share * size) <= 2
    assert sorted(where for each in splits.values() for where, _ in each) == sorted(where for where, _ in rows)
    assert splits == pool(rows, 1) and (total < 20 or splits != pool(rows, 2))


def test_a_repeated_question_stays_on_one_side():
    draw = random.Random(0)
    rows = []
    for n in range(120):
        text = f"Which Number is {n}?"
        for _ in range(draw.choice([1, 1, 2, 3])):
            text = draw.choice([text.upper(), text.lower(), text.replace(" ", "  "), text.replace("?", "？")])
            rows.append((f"row {len(rows)}", {"subject": draw.choice("ab"), "question": text}))
    sides = questions({name: [row for _, row in each] for name, each in pool(rows, 3).items()})
    assert not set(sides["train"]) & set(sides["validation"]) and not set(sides["test"]) & set(
        sides["train"] + sides["validation"]
    )


@pytest.mark.parametrize(
    ("name", "subject"),
    [("physics_test.csv", "physics"), ("test/physics.csv", "physics"), ("education_(profession_level)_val.csv", "education_(profession_level)"),
     ("junior_math_exam_dev.csv.gz", "junior_math_exam"), ("marketing_management.csv", "marketing_management")],
)  # fmt: skip
def test_the_subject_is_in_the_name(tmp_path, name, subject):
    assert subject_of(tmp_path / name) == subject


def test_the_groups_are_those_of_tmmluplus():
    assert len(SUBJECTS) == 66 and set(GROUPS) == {"STEM", "humanities", "social_sciences", "other"}
    assert wanted_subjects([], SUBJECTS) is None and wanted_subjects(["physics"], SUBJECTS) == {"physics"}
    assert wanted_subjects(["STEM", "music"], SUBJECTS) == {*GROUPS["STEM"].split(), "music"}
    assert wanted_subjects(["ungrouped"], ["physics", "my_subject"]) == {"my_subject"}
    with pytest.raises(UserError, match=r"--subjects phisics: .*did you mean physics\?.*Groups: STEM"):
        wanted_subjects(["phisics"], SUBJECTS)


@needs_shared
def test_the_groups_agree_with_the_published_list():
    lines = (SHARED / "tmmluplus_subjects.tsv").read_text("utf-8").splitlines()
    assert {line.split("\t")[0] for line in lines if line.split("\t")[0] in SUBJECTS} == set(SUBJECTS)


def test_folders_files_and_official_splits(tmp_path):
    for subject in ("physics", "music"):
        for split, count in (("dev", 2), ("val", 3), ("test", 5)):
            write_subject(
                tmp_path / "a",
                f"{subject}_{split}.csv",
                [{**ROW, "question": f"{subject} {split} {n}"} for n in range(count)],
            )
    official = recipe(dataset=str(tmp_path / "a"), split="official", subjects=["physics"]).load_rows()
    assert {name: len(list(rows)) for name, rows in official.items()} == {"train": 2, "validation": 3, "test": 5}
    pooled = recipe(dataset=str(tmp_path / "a")).load_rows()
    assert {name: len(list(rows)) for name, rows in pooled.items()} == {"train": 14, "validation": 5, "test": 1}
    assert {row["subject"] for row in pooled["train"]} == {"physics", "music"}
    assert all("_" in where and ", line " in where for where, _ in located(pooled["train"]))
    for split in ("dev", "test"):  # CMMLU's form
        write_subject(
            tmp_path / "c",
            f"{split}/agronomy.csv",
            [{"": n, "Question": f"{split} {n}", "A": 1, "B": 2, "C": 3, "D": 4, "Answer": "A"} for n in range(10)],
        )
    cmmlu = recipe(dataset=str(tmp_path / "c")).load_rows()
    assert {name: len(list(rows)) for name, rows in cmmlu.items()} == {"train": 14, "validation": 5, "test": 1}
    assert {row["subject"] for row in cmmlu["train"]} == {"agronomy"}


def test_columns_under_other_names_are_pooled_by_their_questions(tmp_path):
    rows = [{"題目": f"{n}?", "A": 1, "B": 2, "C": 3, "D": 4, "答案": "A", "note": "x"} for n in range(20)]
    write_subject(tmp_path, "physics_test.csv", rows)
    splits = recipe(dataset=str(tmp_path), columns=["question=題目", "answer=答案"]).load_rows()
    assert {name: len(list(rows)) for name, rows in splits.items()} == {"train": 14, "validation": 5, "test": 1}
    seen = ColumnUsage()
    records = [seen.format(BertTmmluQa.format_row, row) for rows in splits.values() for row in rows]
    assert {record["question"] for record in records} == {row["題目"] for row in rows}
    assert seen.describe() == ["questions (A, B, C, D, question, answer, subject)", "unused columns: note"]


@needs_shared
@pytest.mark.parametrize(("folder", "rows", "subjects"), [("tmmlu", 2630, 49), ("cmmlu", 10243, 58)])
def test_the_real_folders_are_split_without_a_shared_question(folder, rows, subjects):
    splits = {name: list(each) for name, each in recipe(dataset=str(SHARED / folder)).load_rows().items()}
    assert sum(map(len, splits.values())) == rows
    for name, share in (("train", 0.7), ("validation", 0.25), ("test", 0.05)):
        assert len(splits[name]) == pytest.approx(share * rows, abs=2)
    found = Counter(row["subject"] for each in splits.values() for row in each)
    assert len(found) == subjects
    assert all(abs(sum(row["subject"] == s for row in splits["train"]) - 0.7 * count) <= 10 for s, count in found.items())
    sides = questions(splits)
    assert not set(sides["train"]) & set(sides["validation"]) and not set(sides["test"]) & set(
        sides["train"] + sides["validation"]
    )
    assert [row for _, row in located(recipe(dataset=str(SHARED / folder)).load_rows()["test"])] == splits["test"]
    assert [BertTmmluQa.format_row(row)["answer"] for each in splits.values() for row in each].count(0) > 0


def test_accuracy_per_subject_and_group():
    figures = accuracy([0, 1, 2, 3, 0], [0, 1, 2, 0, 1], ["physics", "physics", "music", "music", "mine"])
    assert figures["accuracy"] == 0.6
    assert figures["accuracy_by_subject"]["music"] == {"accuracy": 0.5, "questions": 2}
    assert {name: each["accuracy"] for name, each in figures["accuracy_by_group"].items()} == {
        "STEM": 1.0,
        "other": 0.5,
        "ungrouped": 0.0,
    }


def test_a_run_writes_accuracy_baselines_and_the_held_out_questions(tmp_path):
    for subject in ("physics", "music"):
        write_subject(
            tmp_path / "data",
            f"{subject}_test.csv",
            [{**ROW, "question": f"{subject} {n}", "answer": "ABCDB"[n % 5]} for n in range(40)],
        )
    story = recipe(
        dataset=str(tmp_path / "data"), output_dir=str(tmp_path / "run"), from_scratch=True, max_steps=2, save_steps=2, logging_steps=1,
        global_batch_size=8, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2, warmup_steps=0, verify_model=False,
    )  # fmt: skip
    run, result = run_recipe(story)
    splits = run.prepared.rows.splits
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert result.step == 2 and metrics["eval_accuracy_random"] == 0.25 and 0 <= metrics["eval_accuracy"] <= 1
    most = Counter(splits["train"].data["labels"][:]).most_common(1)[0][0]
    assert metrics["eval_accuracy_majority"] == pytest.approx(
        np.mean([label == most for label in splits["validation"].data["labels"]])
    )
    assert set(metrics["eval_accuracy_by_subject"]) == {"physics", "music"} and set(metrics["eval_accuracy_by_group"]) == {
        "STEM",
        "other",
    }
    assert sum(each["questions"] for each in metrics["eval_accuracy_by_subject"].values()) == 20
    held = json.loads((tmp_path / "run" / "test_qa_data.json").read_text("utf-8"))
    assert len(held) == 4 and {frozenset(each) for each in held} == {frozenset(("subject", "question", "options", "answer"))}
    trained = {row["question"] for row in run.prepared.rows.sources[0].splits["train"]}
    assert all(each["answer"] in "ABCD" and len(each["options"]) == 4 and each["question"] not in trained for each in held)
    model = AutoModelForMultipleChoice.from_pretrained(tmp_path / "run" / "model")
    assert model.config.architectures == ["BertForMultipleChoice"]
    labels = np.array(splits["validation"].data["labels"])
    perfect = story.metrics(splits["validation"], splits["train"], run.prepared.model_config)(
        EvalPrediction(np.eye(4)[labels], labels)
    )
    assert perfect["accuracy"] == 1.0


def test_unknown_subjects_and_empty_folders_end_with_code_two(tmp_path, capfd):
    write_subject(tmp_path / "data", "physics_test.csv", [ROW])
    base = ["--recipe", "bert_tmmlu_qa", "--profile", "starter", "--use_cpu", "--deepspeed", "none"]
    message = refusal(main, [*base, "--dataset", str(tmp_path / "data"), "--subjects", "musik"], capfd)
    assert "--subjects musik" in message and "physics" in message
    (tmp_path / "empty").mkdir()
    assert "no data files" in refusal(main, [*base, "--dataset", str(tmp_path / "empty")], capfd)
    write_subject(tmp_path / "bad", "physics_test.csv", [ROW, ROW, {**ROW, "answer": "X"}])
    message = refusal(main, [*base, "--dataset", str(tmp_path / "bad")], capfd)
    assert "physics_test.csv, line 4: field 'answer'" in message and "--skip_bad_rows" in message
