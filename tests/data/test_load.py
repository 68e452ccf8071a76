"""Data sets as splits: folders, paths and hub names."""

import json

import pytest
from support.tiny import STARTER

from dsrecipes.data.load import load_splits, split_of
from dsrecipes.errors import UserError


def test_a_folder_is_split_by_names(tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "more/extra.jsonl", "test/b.jsonl", "notes.md", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"from": name}))
    splits = {name: [row["from"] for row in rows] for name, rows in load_splits(str(tmp_path)).items()}
    assert splits == {"train": ["more/extra.jsonl", "train.jsonl"], "validation": ["dev.jsonl"], "test": ["test/b.jsonl"]}
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"\.parquet.*DSR111"):
        load_splits(str(empty))


@pytest.mark.parametrize(
    ("name", "split"),
    [("wiki.train.txt", "train"), ("physics_dev.csv", "validation"), ("test/physics.csv", "test"), ("valid.txt", "validation"),
     ("a/latest.csv", None), ("train/x.csv", "train"), ("x-val.jsonl.gz", "validation")],
)  # fmt: skip
def test_the_split_in_a_name(tmp_path, name, split):
    assert split_of(tmp_path / "data" / name) == split


@pytest.mark.parametrize("name", ["./gone.json", "gone.jsonl", "/no/where", "a/b/c", "two words", "gone.csv.gz"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(UserError, match="DSR112"):
        load_splits(name)


def test_a_hub_name_without_a_network():
    with pytest.raises(UserError, match=r"nobody/nothing-here .*--dataset FILE.*DSR113"):
        load_splits("nobody/nothing-here")


def test_the_starter_data_have_the_documented_sizes():
    instructions = json.loads((STARTER / "data" / "instructions.json").read_text("utf-8"))
    assert len(instructions) >= 200 and (STARTER / "data" / "prose.txt").stat().st_size >= 60_000
    texts = [row["instruction"] + row.get("input", "") + row["output"] for row in instructions]
    chinese = sum(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in texts)
    assert 20 <= chinese <= len(texts) - 20 and len(set(texts)) == len(texts)
    files = list((STARTER / "data" / "tmmlu").glob("*.csv"))
    questions = [row for rows in load_splits(str(STARTER / "data" / "tmmlu")).values() for row in rows]
    assert len({path.name.rsplit("_", 1)[0] for path in files}) >= 40 and len(questions) >= 240
    assert all(row["answer"] in "ABCD" and len({row[letter] for letter in "ABCD"}) == 4 for row in questions)
