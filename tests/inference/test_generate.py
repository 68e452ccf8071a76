"""generate: what is answered, in which order, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.finished_runs import made_run
from support.tiny import ROOT, refusal, small_disk, tiny_bert, tiny_gpt2, tiny_llama, write_rows

from dsrecipes import UserError
from dsrecipes.cli import main
from dsrecipes.evaluation.rows import EvaluationRows
from dsrecipes.inference.chat import chat
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.inference.generate import PartialAnswers, generate
from dsrecipes.inference.prompting import prompt_of

ROWS = [{"instruction": f"Count to {n}." + " Slowly." * (n * 7 % 5), "input": "", "output": "1"} for n in range(1, 12)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """An instruction run in Stanford's templates."""
    return open_run(
        str(
            made_run(
                tmp_path_factory.mktemp("run") / "llama", "alpaca_llama_sft", tiny_llama(), prompt_style="alpaca", lora_r=0
            )
        )
    )


def test_each_row_gets_what_it_gets_alone_in_the_files_order(llama: FinishedRun, tmp_path: Path):
    """Left padding and the order of lengths change no answer."""
    path = write_rows(tmp_path / "rows.json", ROWS)
    together = generate(llama, path, batch_size=4, max_new_tokens=6)
    assert [row["index"] for row in together] == list(range(len(ROWS)))
    assert all(ROWS[row["index"]]["instruction"] in row["prompt"] for row in together)
    assert [generate(llama, [row], max_new_tokens=6)[0]["answer"] for row in ROWS] == [row["answer"] for row in together]
    assert {row["reference"] for row in together} == {"1"}


def test_rows_without_an_answer_and_lines_of_a_text_file(llama: FinishedRun, tmp_path: Path):
    """They ask the same, and have no reference."""
    (tmp_path / "asked.txt").write_text("Count to 1.\n\nCount to 2.\n", encoding="utf-8")
    lines = generate(llama, tmp_path / "asked.txt", max_new_tokens=3)
    rows = generate(llama, [{"instruction": "Count to 1."}, {"instruction": "Count to 2."}], max_new_tokens=3)
    assert lines == rows and len(rows) == 2
    assert all("reference" not in row for row in rows)


def test_rows_of_every_form_ask_the_same(llama: FinishedRun, tmp_path: Path):
    """Also under the names that the run was given with --columns, and from a file of several splits."""
    forms = [
        {"prompt": "Why?"}, {"question": "Why?", "answer": ""}, {"conversations": [{"from": "human", "value": "Why?"}]},
        {"instruction": "Why?", "output": None},
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps({"train": forms, "test": forms[:1]}))
    answers = generate(llama, tmp_path / "rows.json", max_new_tokens=2)
    assert len(answers) == 5 and len({row["prompt"] for row in answers}) == 1 and "reference" not in answers[0]
    data = write_rows(tmp_path / "own.jsonl", [{"q": "Why?", "a": 4}])
    path = made_run(
        tmp_path / "run", "alpaca_llama_sft", tiny_llama(), prompt_style="alpaca", lora_r=0, dataset=data, validation_split=0,
        columns={"prompt": "q", "output": "a"},
    )  # fmt: skip
    run = open_run(str(path))
    [own] = generate(run, [{"q": "Why?", "a": 4}], max_new_tokens=2)
    assert own["prompt"] == answers[0]["prompt"] and own["reference"] == "4"
    record = {"instruction": "Why?", "input": "", "output": "4"}
    assert [item.record for item in EvaluationRows(run).items("train")] == [record]
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "Why?", "completion": "4"}])
    assert [item.record for item in EvaluationRows(run, other).items("train")] == [record]


def test_a_text_is_continued(tmp_path: Path):
    """gpt2_clm: the prompt is the text itself, and the blanks that its continuation begins and ends with stay."""
    run = open_run(str(made_run(tmp_path / "gpt2", "gpt2_clm", tiny_gpt2(), max_length=64)))
    vocabulary = run.tokenizer.get_vocab()
    led = [number for token, number in vocabulary.items() if not token.startswith("Ġ")]  # words without a blank before
    [row] = generate(run, [{"text": "The ferry left"}], max_new_tokens=2, suppress_tokens=led)
    assert row["prompt"] == "The ferry left" and row["answer"].startswith(" ")
    assert chat(run, ["The ferry left"], max_new_tokens=2, suppress_tokens=led)[1]["content"] == row["answer"]


TITLES = """
from dsrecipes import RecipeBase
from dsrecipes.data.encode import encode_segments
from dsrecipes.data.fields import text_field

class Titles(RecipeBase):
    format_row = staticmethod(lambda row: {name: text_field(row, name) for name in ("title", "body")})
    @staticmethod
    def encode(records, tokenizer, options):
        return encode_segments([[("# " + row["title"] + "\\n", False), (row["body"], True)] for row in records], tokenizer)
"""
TITLES_PROMPT = """
    @staticmethod
    def prompt(record, options):
        return [("# " + record["title"] + "\\n", False)]
"""
"""Three lines with which rows without an answer and typed texts have a prompt."""


def test_a_recipe_of_the_users_own_needs_no_answer(tmp_path: Path):
    """Its `prompt` says what a row without an answer asks; a line of text fills the one field that it reads."""
    (tmp_path / "mine.py").write_text(TITLES + TITLES_PROMPT)
    run = str(made_run(tmp_path / "run", str(tmp_path / "mine.py"), tiny_llama()))
    (tmp_path / "titles.txt").write_text("Rain\n", encoding="utf-8")
    asked = [generate(run, [{"title": "Rain"}], max_new_tokens=2), generate(run, tmp_path / "titles.txt", max_new_tokens=2)]
    assert asked[0] == asked[1]
    assert asked[0][0]["prompt"] == "<s># Rain\n" and "reference" not in asked[0][0]
    whole = generate(run, [{"title": "Rain", "body": "Wet."}], max_new_tokens=2)[0]
    assert whole["reference"] == "Wet." and whole["prompt"] == "<s># Rain\n"
    assert chat(run, ["Rain"], max_new_tokens=2)[1]["content"] == asked[0][0]["answer"]
    with pytest.raises(UserError, match="field 'title' is missing"):
        generate(run, [{"body": "Wet."}])


def test_a_recipe_without_a_prompt_says_so(tmp_path: Path):
    """Whole rows work; what is missing is named where a text or a row without its answer comes."""
    (tmp_path / "mine.py").write_text(TITLES)
    run = str(made_run(tmp_path / "run", str(tmp_path / "mine.py"), tiny_llama()))
    assert generate(run, [{"title": "Rain", "body": "Wet."}], max_new_tokens=2)[0]["reference"] == "Wet."
    with pytest.raises(UserError, match="field 'body' is missing .*method `prompt`"):
        generate(run, [{"title": "Rain"}])
    with pytest.raises(UserError, match="no method `prompt`.*DSR431"):
        chat(run, ["Rain"])


@pytest.mark.parametrize("read", ["record['title'] + record['body']", "record.get('title', '')"])
def test_a_text_needs_one_field(read: str, tmp_path: Path):
    """A prompt of several fields, or of none that it insists on, has no place for a typed text."""
    (tmp_path / "mine.py").write_text(TITLES + TITLES_PROMPT.replace('record["title"]', read))
    run = str(made_run(tmp_path / "run", str(tmp_path / "mine.py"), tiny_llama()))
    with pytest.raises(UserError, match=r"(several fields \(title, body, ...\)|reads no field).*DSR431"):
        chat(run, ["Rain"])


@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_prompts_are_what_training_rows_begin_with(style: str, tmp_path: Path):
    """With and without its answer a row has one prompt: instructions, chats of several turns, weights of 0."""
    run = open_run(str(made_run(tmp_path / "run", "alpaca_llama_sft", tiny_llama(), prompt_style=style, lora_r=0)))
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = [
        {"instruction": "Why?"}, {"instruction": "Why?", "input": "The sky."}, {"instruction": "Why?", "weight": 0},
        {"messages": messages[1:2]}, {"messages": messages},
    ]  # fmt: skip
    for row in rows:
        if "messages" in row:
            answered = {"messages": [*row["messages"], {"role": "assistant", "content": "So."}]}
        else:
            answered = row | {"output": "So."}
        asked, whole = prompt_of(run, row), prompt_of(run, answered)
        assert asked.ids == whole.ids and asked.reference is None and whole.reference == "So."


def test_bad_rows_are_named_or_left_out(llama: FinishedRun, tmp_path: Path):
    """A row's own number stays in `index`."""
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], {"instruction": [3]}, ROWS[2]])
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: .*must be text.*--skip_bad_rows"):
        generate(llama, path)
    assert [row["index"] for row in generate(llama, path, skip_bad_rows=True, max_new_tokens=2)] == [0, 2]


def test_sampling_depends_on_the_seed_alone(llama: FinishedRun):
    """The same seed gives the same answers, another gives others."""
    first, again, other = (
        [row["answer"] for row in generate(llama, ROWS, seed=seed, max_new_tokens=5, temperature=1.0)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_is_refused(llama: FinishedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """One message, and nothing is written over."""
    run, path, out = str(llama.folder.path), write_rows(tmp_path / "rows.jsonl", ROWS[:2]), tmp_path / "out.jsonl"

    def refused(*flags: object) -> str:
        return refusal(main, ["generate", run, "--prompts", *map(str, flags)], capfd)

    assert "none.jsonl: no such file [DSR441]" in refused(tmp_path / "none.jsonl")
    assert "[DSR435]" in refused(path, "--top_p", 0.9)
    assert "temperature -1.0: " in refused(path, "--temperature", -1)
    assert "at least 1" in refused(path, "--batch_size", 0)
    assert (
        "line 1: " in (message := refused(path, "--max_new_tokens", 500))
        and "512 positions" in message
        and "[DSR432]" in message
    )
    out.write_text("mine")
    assert "name another" in refused(path, "--out", out) and out.read_text() == "mine"
    bert = made_run(tmp_path / "bert", "bert_tmmlu_qa", tiny_bert(), max_length=64)
    assert "[DSR430]" in refusal(main, ["generate", str(bert), "--prompts", path], capfd)


@pytest.fixture(scope="module")
def killed(llama: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a job leaves when SIGKILL meets it after its first answers."""
    folder = tmp_path_factory.mktemp("killed")
    command = [
        sys.executable,
        "-m",
        "dsrecipes.cli",
        "generate",
        str(llama.folder.path),
        "--prompts",
        write_rows(folder / "rows.jsonl", ROWS),
    ]
    command += ["--out", str(folder / "out.jsonl"), *"--batch_size 2 --max_new_tokens 150 --temperature 1 --seed 3".split()]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    partial = folder / "out.jsonl.partial"
    while job.poll() is None and not (partial.is_file() and partial.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert 2 < partial.read_bytes().count(b"\n") < 1 + len(ROWS)
    return folder


SETTINGS = {"batch_size": 2, "max_new_tokens": 150, "temperature": 1.0, "seed": 3}


def test_a_killed_job_ends_as_if_undisturbed(llama: FinishedRun, killed: Path, tmp_path: Path):
    """Sampled answers, and a last line that the kill tore: the same as without the kill, and none is made twice."""
    folder = Path(shutil.copytree(killed, tmp_path / "copy"))
    out, partial = folder / "out.jsonl", folder / "out.jsonl.partial"
    begun = partial.read_bytes()
    partial.write_bytes(begun + b'{"index": 9, "ans')
    kept = [json.loads(line) for line in begun.splitlines()[1:]]
    resumed = generate(llama, folder / "rows.jsonl", out=out, **SETTINGS)
    undisturbed = generate(llama, folder / "rows.jsonl", **SETTINGS)
    assert resumed == undisturbed
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == undisturbed
    assert all(undisturbed[row["index"]]["answer"] == row["answer"] for row in kept)
    assert sorted(path.name for path in folder.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_finished_answers_are_taken_from_the_file(llama: FinishedRun, killed: Path, tmp_path: Path):
    """An answer that is there is not asked for again."""
    folder = Path(shutil.copytree(killed, tmp_path / "copy"))
    partial = folder / "out.jsonl.partial"
    lines = partial.read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line) | {"answer": "kept"} for line in lines[1:3])
    partial.write_text("\n".join([lines[0], *map(json.dumps, (first, second))]) + "\n", encoding="utf-8")
    rows = generate(llama, folder / "rows.jsonl", out=folder / "out.jsonl", **SETTINGS)
    assert [row["index"] for row in rows if row["answer"] == "kept"] == sorted((first["index"], second["index"]))


def test_another_job_does_not_resume(llama: FinishedRun, killed: Path, tmp_path: Path):
    """The message says what differs, and the answers stay."""
    out = tmp_path / "out.jsonl"
    partial = Path(shutil.copy(killed / "out.jsonl.partial", tmp_path))
    before = partial.read_bytes()
    for message, rows, changed in (
        ("max_new_tokens: 150 there, 4 now", ROWS, {"max_new_tokens": 4}),
        ("base: False there, True now", ROWS, {"base": True}),
        ("the prompts changed", ROWS[:-1], {}),
    ):
        with pytest.raises(UserError, match=message):
            generate(llama, rows, out=out, **SETTINGS | changed)
    other = open_run(str(shutil.copytree(llama.folder.path, tmp_path / "other")))
    (other.folder.model / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="the run changed.*DSR437"):
        generate(other, ROWS, out=out, **SETTINGS)
    assert partial.read_bytes() == before and not out.exists()
    partial.write_bytes(b"not json\n" + before)
    with pytest.raises(UserError, match="line 1: .*DSR439"):
        generate(llama, ROWS, out=out, **SETTINGS)


def test_two_processes_do_not_write_the_same_answers(llama: FinishedRun, tmp_path: Path):
    """The second is refused."""
    with (
        PartialAnswers(tmp_path / "out.jsonl", {}),
        pytest.raises(UserError, match="DSR436"),
    ):
        generate(llama, ROWS, out=tmp_path / "out.jsonl")


def test_a_full_disk_is_reported(llama: FinishedRun, tmp_path: Path):
    """And the job resumes once there is room."""
    with small_disk(tmp_path / "disk", "size=16k") as disk:
        (disk / "full").write_bytes(b"x" * 12_000)
        with pytest.raises(UserError, match=r"No space left on device.*DSR438"):
            generate(llama, ROWS * 20, out=disk / "out.jsonl", batch_size=8, max_new_tokens=60, suppress_tokens=[2])
        (disk / "full").unlink()
        with pytest.raises(UserError, match="DSR437"):
            generate(llama, ROWS, out=disk / "out.jsonl")
