"""--streaming true: positions in files, windows, exact resume without reading used rows, and refused settings."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
from dsrecipes.recipes.gpt2_clm import Gpt2Clm
from safetensors.torch import load_file
from support.models import Small
from support.rank_pool import Ranks
from support.tiny import STARTER, instructions, llama_tokenizer, refusal, tiny_bert, tiny_gpt2, write_rows

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data import units, window
from dsrecipes.data.files import FileRows
from dsrecipes.data.renamed import RenamedRows
from dsrecipes.data.sampler import StreamSampler
from dsrecipes.data.stream import Stream
from dsrecipes.errors import UserError
from dsrecipes.model.tokenizer import check_ids
from dsrecipes.run import main

UNIT = 400
ROWS = [{"text": f'row {n}, "quoted"\n' + "word " * (n % 13), "n": str(n)} for n in range(60)]
FORMS = [
    "jsonl",
    "json",
    "csv",
    "tsv",
    "txt",
    "parquet",
    "jsonl.gz",
    "csv.gz",
    "array.json",
    "bom.jsonl",
    "bom.csv",
    "utf16.csv",
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few kB have many pieces, and windows are small."""
    monkeypatch.setattr(units, "UNIT", UNIT)
    monkeypatch.setattr(units, "_ROWS", 7)
    monkeypatch.setattr(window, "WINDOW_TOKENS", 300)


def write(folder: Path, form: str, rows: list[dict[str, str]]) -> Path:
    """Rows in a file of one of FORMS."""
    path = folder / f"rows.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=25)
        return path
    lines = [json.dumps(row) for row in rows]
    text = "[" + ",".join(lines) + "]" if form == "array.json" else "\n\n".join(lines) + "\n"
    if "csv" in form or form == "tsv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    if form == "txt":
        titles = [f" = Title {n} = \n\n" if n % 9 == 0 else "" for n in range(30)]
        text = "".join(title + "a line of some length, number {n}\n\n" * 40 for title in titles)
    data = text.encode("utf-16" if "utf16" in form else "utf-8-sig" if "bom" in form else "utf-8")
    path.write_bytes(gzip.compress(data) if form.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_row_occurs_once_and_reading_continues_from_any_position(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form, ROWS)
    files = units.Units((path,))
    pieces = [
        (unit, rows, after, position)
        for unit in range(len(files))
        for (rows, after), position in _with_positions(files, unit)
    ]
    assert len(pieces) > 3
    located = [(str(where), row) for _, rows, _, _ in pieces for where, row in rows]
    assert located == list(FileRows((path,)).located())
    for unit, rows, after, position in pieces:
        first, second = (list(files.pieces(unit, position)) + [None])[:2]
        assert first == (rows, after), position
        assert (second is None) == (after is None) or form not in ("csv", "txt", "parquet")


def _with_positions(files: units.Units, unit: int) -> Any:
    """A unit's pieces, each with the position that it begins at."""
    position = None
    for piece in files.pieces(unit):
        yield piece, position
        position = piece[1]


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt"])
def test_a_position_is_reached_without_reading_what_is_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    path = write(tmp_path, form, ROWS * 40)
    size, reads = path.stat().st_size, []

    class Watched(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            start, count = self.tell(), super().readinto(buffer)
            reads.append((start, count))
            return count

    def watched(self: Path, mode: str = "r", **_: Any) -> Any:
        return io.BufferedReader(Watched(str(self)), 512) if mode == "rb" else open(self, mode)

    files = units.Units((path,))
    if form == "jsonl":
        unit, position = len(files) * 3 // 4, None
        begin = unit * UNIT - 1
    else:
        position = [piece[1] for piece in files.pieces(0)][len(list(files.pieces(0))) * 3 // 4]
        unit, begin = 0, position["offset"]
    assert begin > size // 2
    monkeypatch.setattr(Path, "open", watched)
    monkeypatch.setattr(units, "_HEAD", 512)
    next(files.pieces(unit, position))
    header = 0 if form != "csv" else 1000 * 120  # the first thousand lines say what separates the columns
    assert reads and not [start for start, count in reads if header <= start < begin - 512]
    assert sum(count for start, count in reads if start >= begin - 512) < 20 * UNIT


def a_stream(path: Path | FileRows | RenamedRows, recipe: type = AlpacaLlamaSft, **changed: Any) -> Stream:
    """A stream over a file or rows of files, four sequences a step."""
    values = {
        "per_step": 4, "steps": 1000, "seed": 1, "shuffle": True, "packing": True, "skip_bad_rows": False,
        "check_ids": partial(check_ids, tokenizer=llama_tokenizer(), rows=None),
    }  # fmt: skip
    rows = FileRows((path,)) if isinstance(path, Path) else path
    return Stream(rows, recipe, llama_tokenizer(), EncodeOptions(200, "alpaca"), **values | changed)


def contents(data: Stream, steps: range) -> list[Any]:
    """Everything that the trainer would see of some steps."""
    return [
        [[{name: np.asarray(value).tolist() for name, value in row.items()} for row in data[step * 4 + place]] for place in range(4)]
        for step in steps
    ]  # fmt: skip


def read(data: Stream, steps: int) -> None:
    """Begin, and look at some steps."""
    data.begin(None)
    contents(data, range(steps))


@pytest.mark.parametrize(("recipe", "form"), [(AlpacaLlamaSft, "jsonl"), (AlpacaLlamaSft, "csv"), (AlpacaLlamaSft, "jsonl.gz"), (Gpt2Clm, "txt")])  # fmt: skip
@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_continues_exactly_from_a_state(tmp_path: Path, recipe: type, form: str, packing: bool) -> None:
    path = write(tmp_path, form, instructions(50))
    whole = a_stream(path, recipe, packing=packing)
    whole.begin(None)
    expected, states, epochs = [], [], []
    for step in range(25):
        states.append(json.loads(json.dumps(whole.state(step))))  # as a checkpoint holds it
        expected += contents(whole, range(step, step + 1))
        epochs.append(whole.epoch(step + 1))
    assert epochs == sorted(epochs)
    assert epochs[-1] > 1 or recipe is Gpt2Clm
    assert len({json.dumps(state) for state in states}) > 3, "several windows"
    assert form == "jsonl.gz" or any(state["rows"] or state["rest"] for state in states), "some windows leave rows over"
    for step in range(0, 25, 4):
        resumed = a_stream(path, recipe, packing=packing)
        resumed.begin(states[step])
        assert contents(resumed, range(step, 25)) == expected[step:]
        assert (resumed.facts(25)["used_rows"], resumed.epoch(25)) == (whole.facts(25)["used_rows"], epochs[-1])


def test_each_epoch_has_each_row_once_in_another_order(tmp_path: Path) -> None:
    paths = (write(tmp_path, "jsonl", instructions(30)), write(tmp_path, "csv", instructions(60)[30:]))
    data = a_stream(FileRows(paths), packing=False)
    data.begin(None)
    orders: dict[int, list[str]] = {}
    for step in range(60):
        texts = contents(data, range(step, step + 1))[0]
        epoch = data.window.begin.epoch
        trained = [row["input_ids"] for rows in texts for row in rows if set(row["labels"]) != {-100}]
        orders.setdefault(epoch, []).extend(map(str, trained))
    assert len(orders) > 2
    assert sorted(orders[0]) == sorted(orders[1]) and len(set(orders[0])) == len(orders[0]) == 60
    assert orders[0] != orders[1]
    facts = data.facts(data.window.begin.step)
    assert facts["used_rows"] % 60 == 0 or facts["epochs"] % 1


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (1, 2, 2), (2, 2, 1)])
def test_ranks_share_a_step_however_it_is_divided(shape: tuple[int, int, int]) -> None:
    accumulation, ranks, _ = shape
    batches = [list(StreamSampler(5, shape, rank)) for rank in range(ranks)]
    for step in range(5):
        mine = [batch for rank in batches for batch in rank[step * accumulation : (step + 1) * accumulation]]
        assert sorted(sum(mine, [])) == list(range(4 * step, 4 * step + 4))


def test_named_columns_are_streamed(tmp_path: Path) -> None:
    rows = [{"output": row["output"], "task": row["instruction"]} for row in instructions(20)]
    files = FileRows((write(tmp_path, "jsonl", rows),))
    data = a_stream(RenamedRows(files, (("instruction", "task"),)))
    read(data, 3)
    assert data.window.end.read.kept > 5
    with pytest.raises(UserError, match="'job'.*DSR130"):
        read(a_stream(RenamedRows(files, (("instruction", "job"),))), 1)


def test_a_file_shorter_than_a_step_fills_it(tmp_path: Path) -> None:
    data = a_stream(write(tmp_path, "jsonl", instructions(2)), packing=False)
    data.begin(None)
    labels = [set(row["labels"]) for rows in contents(data, range(1))[0] for row in rows]
    assert [ids == {-100} for ids in labels] == [False, False, True, True]
    assert data.rows(3) == [] and data.facts(1)["used_rows"] == 2
    contents(data, range(1, 2))
    assert data.window.begin.epoch == 1


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "jsonl.gz"])
def test_a_bad_row_in_the_middle_names_file_and_line(tmp_path: Path, form: str) -> None:
    rows = instructions(40)
    rows[29]["output"] = ""
    place = {"jsonl": "line 59", "csv": "line 31", "parquet": "row 30", "jsonl.gz": "line 59"}[form]
    path = write(tmp_path, form, rows)
    data = a_stream(path, shuffle=False)
    with pytest.raises(UserError, match=f"{path}, {place}: field 'output' .*DSR101"):
        read(data, 20)
    skipping = a_stream(path, shuffle=False, skip_bad_rows=True)
    read(skipping, 20)
    assert skipping.facts(20)["dropped"]["bad row"] >= 1
    assert skipping.fingerprint == data.fingerprint  # so that a run which stopped there can resume with --skip_bad_rows


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda text: text.replace('"output"', "output", 30), "not JSON"),
        (
            lambda text: text[: len(text) // 2] + "17\n" + text[len(text) // 2 :].partition("\n")[2],
            "DSR005|DSR123",
        ),
        (lambda text: "\n\n", "DSR103"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, spoil: Any, problem: str) -> None:
    path = write(tmp_path, "jsonl", instructions(30))
    path.write_text(spoil(path.read_text()))
    data = a_stream(path)
    with pytest.raises(UserError, match=problem):
        read(data, 12)


def test_bytes_that_are_not_utf8_and_a_file_that_changes_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", instructions(60))
    good = path.read_bytes()
    path.write_bytes(good[:3000].replace(b"Count", b"C\xf6unt") + good[3000:])
    with pytest.raises(UserError, match="DSR116"):
        read(a_stream(path, shuffle=False), 20)
    path.write_bytes(good)
    data = a_stream(path)
    data.begin(None)
    path.write_bytes(good + good)
    with pytest.raises(UserError, match="DSR157"):
        contents(data, range(30))


def test_another_end_token_is_another_stream(tmp_path: Path) -> None:
    data = a_stream(write(tmp_path, "jsonl", instructions(5)))
    tokenizer = data.reader.encoding.tokenizer
    tokenizer.eos_token = tokenizer.bos_token
    assert data.reader.fingerprint() != data.fingerprint


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", instructions(5))
    data = a_stream(path, check_ids=partial(check_ids, tokenizer=llama_tokenizer(), rows=60))
    with pytest.raises(UserError, match=f"{path}, line .*DSR158"):
        data.begin(None)


REFUSED = {
    "no steps": ({"num_train_epochs": 2, "max_steps": -1}, "DSR153"),
    "held out": ({"validation_split": 0.1}, "DSR154"),
    "hub": ({"dataset": "tatsu-lab/alpaca"}, "DSR152"),
    "epochs": ({"eval_strategy": "epoch"}, "--eval_strategy .*DSR155"),
    "recipe": ({"recipe": "bert_tmmlu_qa", "model_name_or_path": None, "dataset": None}, "DSR151"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stream_cannot_do_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    changed, problem = REFUSED[name]
    values = {
        "recipe": "alpaca_llama_sft", "model_name_or_path": tiny_gpt2(), "dataset": write_rows(tmp_path / "a.jsonl", instructions(9)),
        "prompt_style": "alpaca", "streaming": "true", "max_steps": 2, "use_cpu": "true", "deepspeed": "none", **changed,
    }  # fmt: skip
    if name == "recipe":
        values["model_name_or_path"] = tiny_bert()
    words = [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]
    assert re.search(problem, refusal(main, words, capfd))


def test_a_dry_run_shows_the_first_example_and_what_is_not_known(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "--recipe", "alpaca_llama_sft", "--model_name_or_path", tiny_gpt2(), "--dataset", write_rows(tmp_path / "a.jsonl", instructions(9)),
        "--eval_dataset", write_rows(tmp_path / "b.jsonl", instructions(3)), "--prompt_style", "alpaca", "--streaming", "true", "--max_steps", "2",
        "--use_cpu", "true", "--deepspeed", "none", "--dry_run", "true", "--lora_r", "0", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "streamed from 1 file" in said and "not known in advance" in said and "validation: 3 rows" in said
    assert "Count to" in said and "⟦" in said and not (tmp_path / "run").exists()


# ---- real ranks ----


def case(small: Small, folder: Path, **changed: Any) -> dict[str, Any]:
    """A streamed run of some steps, in several windows."""
    path = folder / "rows.jsonl"
    if not path.is_file():
        rows = json.loads((STARTER / "data" / "instructions.json").read_text(encoding="utf-8"))
        write_rows(path, [row for row in rows if row["output"].strip()][:28])
    values = {
        "dataset": str(path), "validation_split": 0, "streaming": True, "packing": True, "eval_strategy": "no", "max_steps": 8,
        "save_steps": 4, "max_length": 400, "global_batch_size": 4, "per_device_train_batch_size": 1,
    }  # fmt: skip
    return small.values("alpaca", **values | changed) | {"tokens": 2000}


def losses(run: dict[str, Any]) -> list[float]:
    """Of each step."""
    return [line["loss"] for line in run["log"] if "loss" in line]


def weights(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a run's model."""
    (file,) = Path(run["path"], "model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", ["none", "zero2", "zero3"])
def test_a_streamed_run_resumes_bit_for_bit_and_on_another_number_of_ranks(
    one_rank: Ranks, two_ranks: Ranks, small: Small, tmp_path: Path, stage: str
) -> None:
    run = partial(case, small, tmp_path, deepspeed=stage)
    whole = two_ranks.run("train_in_windows", **run(output_dir=str(tmp_path / "whole")))[0]
    assert len(losses(whole)) == 8 and whole["log"][-1]["epoch"] > 1, "the file ends and begins again"
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    checkpoint = str(Path(whole["path"]) / "checkpoints" / "checkpoint-4")
    resumed = two_ranks.run(
        "train_in_windows", **run(output_dir=str(tmp_path / "again"), resume_from_checkpoint=checkpoint)
    )[0]
    assert losses(resumed) == losses(whole)[4:]  # step 5 is in a window of its own, where no sequence is packed
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())
    if stage == "zero3":
        return
    alone = one_rank.run("train_in_windows", **run(output_dir=str(tmp_path / "alone"), per_device_train_batch_size=2))[0]
    # sums in another order differ in their last bits
    assert losses(alone) == pytest.approx(losses(whole), rel=1e-5)
    moved = one_rank.run("train_in_windows", **run(output_dir=str(tmp_path / "moved"), resume_from_checkpoint=checkpoint))[0]
    assert losses(moved) == pytest.approx(losses(whole)[4:], rel=1e-5)


@pytest.mark.ranks
def test_a_file_that_changed_since_is_refused(one_rank: Ranks, small: Small, tmp_path: Path) -> None:
    run = partial(
        case, small, tmp_path, max_steps=4, save_steps=2, output_dir=str(tmp_path / "run"), resume_from_checkpoint="auto"
    )
    lora = {"lora_r": 4, "lora_alpha": 8}
    first = one_rank.run("train_in_windows", **run(**lora))[0]
    data = json.loads((Path(first["path"]) / "data.json").read_text())["train"]
    assert data["used_rows"] > 8 and data["used_tokens"] > 1000 and data["streamed"]
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(instructions(1)[0]) + "\n")
    with pytest.raises(UserError, match="data is streamed .* there and streamed"):
        one_rank.run("train_in_windows", **run(**lora))
    with pytest.raises(UserError, match="resumes by position"):
        one_rank.run("train_in_windows", **run(**lora, allow_changed=["data"]))
