"""Preparing rows: what is kept, dropped, held out and refused, and what the cache key covers."""

import hashlib
import io
import json
import multiprocessing
import os
import random
import sys
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
from dsrecipes.recipes.gpt2_clm import Gpt2Clm
from support.tiny import STARTER, llama_tokenizer, write_rows
from transformers import AutoTokenizer

from dsrecipes.base import RecipeBase
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.columns import ColumnWriter, record_batch
from dsrecipes.data.encode import encode_texts
from dsrecipes.data.fields import text_field
from dsrecipes.data.holdout import hold_out
from dsrecipes.data.load import load_splits
from dsrecipes.data.prepare import prepare
from dsrecipes.data.provenance import RowSources
from dsrecipes.data.records import record_hash
from dsrecipes.errors import UserError
from dsrecipes.io.console import Console

ENCODED = []
"""Batches that Lines.encode was called with: how much was really tokenized."""


class Lines(RecipeBase):
    """Short texts, one sequence each."""

    @staticmethod
    def format_row(row):
        return {"text": text_field(row, "text")}

    @staticmethod
    def encode(records, tokenizer, options):
        ENCODED.append(len(records))
        return encode_texts(records, tokenizer)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSRECIPES_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STARTER / "gpt2")


def prepared(recipe, splits, tokenizer, length=64, style="alpaca", **changes):
    console = Console(main=False)
    console.out = io.StringIO()
    settings = {"validation_split": 0.0, "seed": 1, "skip_bad_rows": False} | changes
    splits = splits if isinstance(splits, dict) else load_splits(splits)
    return prepare(recipe, splits, tokenizer, EncodeOptions(length, style), console=console, **settings)


@pytest.mark.parametrize("length", [16, 256, 1000])
def test_tokens_in_are_tokens_trained_and_one_counted_tail(tokenizer, length):
    path = STARTER / "data" / "prose.txt"
    split = prepared(Gpt2Clm, str(path), tokenizer, length)["train"]
    rows = list(load_splits(str(path))["train"])
    trained = [token for row in split.data for token in row["input_ids"]]
    everything = [token for ids in encode_texts(rows, tokenizer)["input_ids"] for token in ids]
    assert trained == everything[: len(trained)] and len(everything) - len(trained) == split.stats.tail < length
    assert split.stats.tokens == len(everything) and split.stats.supervised == len(trained)
    assert {len(row["input_ids"]) for row in split.data} == {length}
    assert split.data["labels"][:] == split.data["input_ids"][:]
    assert Counter(everything)[tokenizer.eos_token_id] == sum(row["end"] for row in rows) >= 1


def test_eos_separates_documents(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "three three three"}])
    ids = [token for row in prepared(Gpt2Clm, path, tokenizer, 3)["train"].data for token in row["input_ids"]]
    assert tokenizer.decode(ids).startswith("one<|endoftext|>two<|endoftext|>")


def test_a_short_validation_text_is_kept_to_its_last_token(tokenizer):
    rows = [{"text": "some words to learn from, over and over"}]
    splits = prepared(Gpt2Clm, {"train": rows, "validation": rows}, tokenizer, 4)
    train, held = splits["train"], splits["validation"]
    assert train.stats.tail == train.stats.tokens % 4 and held.stats.tail <= 1
    assert sum(map(len, held.data["input_ids"])) == held.stats.tokens - held.stats.tail
    alone = prepared(Gpt2Clm, {"train": rows}, tokenizer, 500)["train"]
    assert len(alone.data) == 1 and alone.stats.tail == 0  # a text below one block is all there is: it is used


BAD = {
    "missing": ({"instruction": "a"}, "field 'output' is missing"),
    "type": ({"instruction": "a", "output": ["x"]}, "field 'output' must be text, found list"),
    "empty": ({"instruction": "a", "output": " "}, "field 'output' is empty"),
    "no instruction": ({"instruction": "", "output": "x"}, "field 'instruction' is empty"),
    "list": ({"instruction": ["a"], "output": "x"}, "field 'instruction' must be text, found list"),
    "chat": (
        {"messages": [{"role": "user", "content": "q"}]},
        "messages: expected at least one answer (a turn of role assistant), found user",
    ),
    "turn": ({"messages": ["q"]}, "messages: turn 1 must be an object"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_bad_row_is_refused_with_its_place_or_dropped_and_counted(tokenizer, tmp_path, name, kind):
    bad, problem = BAD[name]
    good = {"instruction": "a", "input": "", "output": "b"}
    path = write_rows(tmp_path / f"rows.{kind}", [good, good, bad, good])
    message = f"rows.{kind}, {'row' if kind == 'json' else 'line'} 3: {problem}"
    with pytest.raises(UserError) as error:
        prepared(AlpacaLlamaSft, path, tokenizer, 128)
    assert message in str(error.value) and "--skip_bad_rows" in str(error.value), error.value
    stats = prepared(AlpacaLlamaSft, path, tokenizer, 128, skip_bad_rows=True)["train"].stats
    assert (stats.kept, stats.dropped) == (3, {"bad row": 1})


def test_long_rows_are_dropped_and_counted_never_cut(tokenizer):
    rows = [{"text": "word " * count} for count in (1, 2, 3, 200, 300)]
    split = prepared(Lines, {"train": rows}, tokenizer, 64)["train"]
    assert (split.stats.rows, split.stats.kept) == (5, 3) and split.stats.dropped == {"longer than 64 tokens": 2}
    assert len(split.data) == 3


@pytest.mark.parametrize(
    ("rows", "recipe", "length", "parts"),
    [
        ([], Lines, 8, ["train data are empty"]),
        (
            [{"text": "word " * 99}],
            Lines,
            8,
            ["no train row has a token to train on", "1 longer than 8 tokens", "--max_length"],
        ),
        ([{"text": ""}], Lines, 8, ["no train row", "nothing to learn from"]),
        ([{"text": ""}], Gpt2Clm, 8, ["no train row"]),
        ([{"instruction": "word " * 99, "output": "x"}], AlpacaLlamaSft, 16, ["1 longer than 16 tokens", "--max_length"]),
    ],
)
def test_nothing_to_train_on_is_refused(tokenizer, rows, recipe, length, parts):
    with pytest.raises(UserError) as error:
        prepared(recipe, {"train": rows}, tokenizer, length)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_an_empty_file_is_refused(tokenizer, tmp_path, name):
    (tmp_path / name).write_text("[]" if name == "a.json" else "text\n" if name == "a.csv" else "")
    with pytest.raises(UserError, match="train data .*DSR103"):
        prepared(Gpt2Clm, str(tmp_path / name), tokenizer)


def test_only_bad_rows_are_counted_in_the_refusal(tokenizer):
    with pytest.raises(UserError, match=r"2 rows dropped \(2 bad rows\).*DSR102"):
        prepared(Lines, {"train": [{}, {"text": [1]}]}, tokenizer, skip_bad_rows=True)


def test_hold_out_keeps_equal_rows_on_one_side():
    keys = np.array([record_hash({"n": n % 37}) for n in range(400)], np.uint64)
    out = hold_out(keys, 0.1, 3)
    assert 40 <= out.sum() <= 51 and (out == hold_out(keys, 0.1, 3)).all() and (out != hold_out(keys, 0.1, 4)).any()
    assert not set(keys[out]) & set(keys[~out])
    few = [
        hold_out(np.array(keys, np.uint64), share, 0).sum() for keys, share in (([], 0.5), ([7, 7], 0.5), ([7, 8], 0.001))
    ]
    assert few == [0, 0, 1]


def test_the_choice_of_held_out_rows_is_that_of_earlier_versions():
    records = [{"text": f"row {n % 700}"} for n in range(1000)]
    groups = {}
    for index, record in enumerate(records):
        text = json.dumps(record, sort_keys=True).encode()
        groups.setdefault(hashlib.md5(text, usedforsecurity=False).hexdigest(), []).append(index)
    names, chosen = sorted(groups), set()
    random.Random(5).shuffle(names)
    for name in names[:-1]:
        if len(chosen) < 130:
            chosen.update(groups[name])
    keys = np.array([record_hash(record) for record in records], np.uint64)
    assert set(np.flatnonzero(hold_out(keys, 0.13, 5)).tolist()) == chosen


def test_validation_rows_are_not_trained_on(tokenizer):
    rows = [{"text": f"text number {n % 50} of many"} for n in range(200)]
    splits = prepared(Lines, {"train": rows}, tokenizer, validation_split=0.2)
    texts = {name: set(map(tuple, split.data["input_ids"])) for name, split in splits.items()}
    assert not texts["train"] & texts["validation"] and len(splits["validation"].data) == 40
    assert splits["train"].stats.kept + splits["validation"].stats.kept == 200
    given = prepared(Lines, {"train": rows, "validation": rows[:3]}, tokenizer, validation_split=0.2)
    assert len(given["train"].data) == 200 and len(given["validation"].data) == 3


def test_the_cache_key_covers_the_content(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(20)])

    def tokenized(*args, **kwargs):
        ENCODED.clear()
        prepared(Lines, *args, **kwargs)
        return sum(ENCODED)

    assert [tokenized(path, tokenizer) for _ in range(3)] == [20, 0, 0]
    assert tokenized(path, tokenizer, 63) == 20 and tokenized(path, tokenizer, style="chat") == 20
    assert tokenized(path, tokenizer, seed=2) == 0  # nothing is drawn: the seed changes nothing
    assert tokenized(path, tokenizer, validation_split=0.1) == 20 == tokenized(path, tokenizer, validation_split=0.1, seed=2)
    assert tokenized(path, llama_tokenizer()) == 20
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(raw.replace(b"text 7", b"text 8"))
    assert tokenized(path, tokenizer) == 20
    (tmp_path / "a.jsonl").write_bytes(raw)
    assert tokenized(path, tokenizer) == 0


def test_a_recipe_of_a_notebook_is_refused(tokenizer, monkeypatch):
    """Its `__main__` has no file, so the cache key could not cover the code."""
    monkeypatch.setitem(sys.modules, "notebook_main", types.ModuleType("notebook_main"))
    recipe = type("Mine", (Lines,), {"__module__": "notebook_main"})
    with pytest.raises(UserError, match=r"notebook_main.*DSR185"):
        prepared(recipe, {"train": [{"text": "one two"}]}, tokenizer)


def test_the_learning_rate_is_not_part_of_the_cache_key(tmp_path):
    from dsrecipes import load_recipe
    from dsrecipes.recipe_class import recipe_class

    def key(**values):
        recipe = load_recipe("gpt2_clm", profile="starter", deepspeed="none", **values)
        tokenizer = recipe.load_tokenizer()
        data = recipe.config.data
        prepared(recipe_class(recipe.config.layers.recipe), recipe.load_rows(), tokenizer, data.max_length)
        return {entry.name for entry in (tmp_path / "cache" / "data").iterdir() if entry.is_dir()}

    first = key()
    assert len(first) == 1 and key(learning_rate=0.5, per_device_train_batch_size=2, weight_decay=0.3) == first
    assert len(key(max_length=128)) == 2


def test_an_incomplete_cache_entry_is_written_again(tokenizer, tmp_path):
    rows = {"train": [{"text": "one two"}]}
    prepared(Lines, rows, tokenizer)
    (entry,) = [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]
    (entry / "stats.json").unlink()
    ENCODED.clear()
    split = prepared(Lines, rows, tokenizer)["train"]
    assert ENCODED == [1] and np.array_equal(split.data[0]["input_ids"], split.data[0]["labels"])


class Turns(Lines):
    """One sequence for each word; a row without words has none."""

    @staticmethod
    def encode(records, tokenizer, options):
        words = [(index, word) for index, record in enumerate(records) for word in record["text"].split()]
        return encode_texts([{"text": word} for _, word in words], tokenizer) | {"record": [index for index, _ in words]}


def test_a_row_may_become_several_sequences(tokenizer):
    long = "\u6c34" * 9
    texts = ["one two", "", f"three {long} four", long, "five"]
    split = prepared(Turns, {"train": [{"text": text} for text in texts]}, tokenizer, 8)["train"]
    words = [tokenizer.decode(ids[:-1]) for ids in split.data["input_ids"]]
    assert words == ["one", "two", "three", "four", "five"] and split.data.column_names == ["input_ids", "labels"]
    assert (split.stats.rows, split.stats.kept) == (5, 3)
    assert split.stats.dropped == {
        "nothing to learn from": 1, "longer than 8 tokens": 1, "in part longer than 8 tokens": 1,
    }  # fmt: skip
    assert RowSources(split.path).describe([1, 3, 4]) == "rows 1, 3, 5"
    splits = prepared(Turns, {"train": [{"text": text} for text in texts] * 4}, tokenizer, 8, validation_split=0.4)
    ids = {name: set(map(tuple, split.data["input_ids"])) for name, split in splits.items()}
    assert not ids["train"] & ids["validation"] and sum(split.stats.rows for split in splits.values()) == 20


def rows_of_all_kinds(count):
    rows = [{"text": f"row {n} of {n % 7} words " + "and more " * (n % 11)} for n in range(count)]
    return [
        *rows[: count // 2],
        {"text": [3]},
        {"text": "word " * 99},
        {"text": ""},
        *rows[: count // 3],
        *rows[count // 2 :],
    ]


@pytest.mark.parametrize("recipe", [Lines, Turns, Gpt2Clm])
@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_workers_make_the_same_files(tokenizer, tmp_path, monkeypatch, recipe, held_out):
    monkeypatch.setattr("dsrecipes.data.chunk._ROWS", 16)
    path, files = write_rows(tmp_path / "rows.jsonl", rows_of_all_kinds(300)), []
    for workers in (1, 3):
        monkeypatch.setenv("DSRECIPES_CACHE", str(tmp_path / f"cache{workers}"))
        settings = {"validation_split": held_out, "skip_bad_rows": True, "workers": workers}
        splits = prepared(recipe, path, tokenizer, 64, **settings)
        assert sum(split.stats.rows for split in splits.values()) == 402 and splits["train"].stats.dropped["bad row"] == 1
        folder = splits["train"].path.parent
        files.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert files[0] == files[1] and set(files[0]) == {
        "stats.json", *(f"{name}.{end}" for name in splits for end in ("arrow", "rows")),
    }  # fmt: skip
    assert len(splits) == 1 + bool(held_out)


def test_each_row_is_formatted_and_encoded_once(tokenizer, monkeypatch):
    class Counted(Lines):
        @staticmethod
        def format_row(row):
            FORMATTED.append(row["text"])
            return {"text": row["text"]}

    FORMATTED = []
    ENCODED.clear()
    rows = [{"text": f"text {n}"} for n in range(1200)]
    prepared(Counted, {"train": rows}, tokenizer, validation_split=0.2)
    assert [row["text"] for row in rows] == FORMATTED and ENCODED == [512, 512, 176]


def test_a_bad_row_in_a_worker_is_named_and_the_first_one_wins(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("dsrecipes.data.chunk._ROWS", 16)
    rows = [{"text": f"text {n}"} for n in range(400)]
    rows[200], rows[330] = {"other": "x"}, {"another": "x"}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"rows.jsonl, line 201: field 'text' .*DSR101"):
            prepared(Lines, path, tokenizer, workers=workers)
    with pytest.raises(UserError, match=r"rows.jsonl, line 400.*DSR005"):
        prepared(Lines, path, tokenizer, workers=2, skip_bad_rows=True)
    assert not multiprocessing.active_children()
    left = {entry.name.split(".", 1)[-1] for entry in (tmp_path / "cache" / "data").iterdir()}
    assert left <= {"lock", "partial"}  # nothing that a later run would use


def test_the_fingerprint_is_of_the_rows_whatever_batches_they_are_written_in(tmp_path):
    columns = {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[1, 2], [-100], [4, 5, 6]]}
    together, apart, other = (ColumnWriter(tmp_path / name, piece=0) for name in "abc")
    with together, apart, other:
        together.write(record_batch(columns))
        for row in range(3):
            apart.write(record_batch({name: values[row : row + 1] for name, values in columns.items()}))
        other.write(record_batch(columns | {"input_ids": [[1], [2, 3], [4, 5, 6]]}))
    assert together.fingerprint == apart.fingerprint != other.fingerprint and together.largest == 6


def test_a_killed_preparation_leaves_nothing_that_a_later_run_uses(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("dsrecipes.data.chunk._ROWS", 16)
    path = write_rows(tmp_path / "rows.jsonl", rows_of_all_kinds(600))
    pids = tmp_path / "pids"
    pids.mkdir()

    class Slow(Lines):
        @staticmethod
        def encode(records, tokenizer, options):
            (pids / str(os.getpid())).touch()
            if multiprocessing.parent_process():
                time.sleep(0.05)
            return encode_texts(records, tokenizer)

    settings = {"validation_split": 0.2, "skip_bad_rows": True, "workers": 2}
    process = multiprocessing.get_context("fork").Process(
        target=prepared, args=(Slow, path, tokenizer), kwargs=settings, daemon=False
    )
    process.start()
    entries = tmp_path / "cache" / "data"
    wait_until(lambda: any(file.stat().st_size for file in entries.glob("*.partial/undivided.arrow")))
    process.kill()
    process.join()
    wait_until(lambda: not any(Path("/proc", pid.name).exists() for pid in pids.iterdir()))  # the workers too
    assert len(list(pids.iterdir())) == 2 and {entry.suffix for entry in entries.iterdir()} == {".lock", ".partial"}
    splits = prepared(Slow, path, tokenizer, **settings)
    assert {entry.suffix for entry in entries.iterdir()} == {".lock", ""}
    assert sum(split.stats.kept for split in splits.values()) > 700


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_splits_of_one_file_have_cache_entries_of_their_own(tokenizer, tmp_path):
    path = tmp_path / "both.json"
    path.write_text(json.dumps({"train": [{"text": "one"}], "test": [{"text": "two"}]}))
    splits = load_splits(str(path))
    texts = [prepared(Lines, {"train": splits[name]}, tokenizer)["train"].data[0]["input_ids"] for name in splits]
    assert tokenizer.batch_decode(texts, skip_special_tokens=True) == ["one", "two"]


def test_truncation_left_over_from_a_call_is_not_part_of_the_key(tmp_path):
    own, rows = AutoTokenizer.from_pretrained(STARTER / "gpt2"), [{"text": "one two three"}]
    before = prepared(Lines, {"train": rows}, own)["train"].path
    own(["one two three"], truncation=True, max_length=2)
    assert prepared(Lines, {"train": rows}, own)["train"].path == before
