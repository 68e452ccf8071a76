"""The record of a judge's work: what a restart finds, and what it refuses."""

import json

import pytest

from dsrecipes.errors import UserError
from dsrecipes.use.judge_file import JudgeFile, alone

JOB = {"run": "runs/a", "items": 2, "rubric": "ab" * 32}
ANSWER = {"kind": "answer", "item": 0, "of": "run", "text": "第一行\u2028second\r\n"}
JUDGED = {"kind": "judgement", "item": 0, "order": "run first", "verdict": "A", "requests": 1}


def test_what_was_written_is_found(tmp_path):
    path = tmp_path / "judge.jsonl"
    file = JudgeFile(path, JOB)
    file.write(ANSWER)
    file.write(JUDGED)
    again = JudgeFile(path, JOB | {"run": "moved/a"})
    assert again.answers == {(0, "run"): ANSWER["text"]} and again.judgements == {(0, "run first"): JUDGED}


def test_a_torn_last_line_is_passed_over_at_every_byte(tmp_path):
    path = tmp_path / "judge.jsonl"
    JudgeFile(path, JOB).write(ANSWER)
    whole = path.read_bytes()
    line = json.dumps(ANSWER, ensure_ascii=False).encode()
    for cut in range(1, len(line)):
        path.write_bytes(whole + line[:cut])
        file = JudgeFile(path, JOB)
        file.write(JUDGED)
        assert JudgeFile(path, JOB).judgements == {(0, "run first"): JUDGED}
    assert len(path.read_bytes().splitlines()) == 3


def test_another_job_is_refused_by_name(tmp_path):
    path = tmp_path / "judge.jsonl"
    JudgeFile(path, JOB).write(ANSWER)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"its items is 2, now it is 3"):
        JudgeFile(path, JOB | {"items": 3})
    with pytest.raises(UserError, match=r"its rubric is abababababab\.\.\., now it is cdcdcdcdcdcd\.\.\."):
        JudgeFile(path, JOB | {"rubric": "cd" * 32})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["notes", "notes\n", '{"a": 1}\n', "[1]\n", '{"kind": "answer"}\n{"kind": "ans'])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="not written by `dsrecipes judge`"):
        JudgeFile(path, JOB)
    assert path.read_text() == text


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "judge.jsonl"
    file = JudgeFile(path, JOB)
    file.write(ANSWER)
    with path.open("a") as damaged:
        damaged.write("{damaged\n")
    file.write(JUDGED)
    with pytest.raises(UserError, match="line 3: "):
        JudgeFile(path, JOB)


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "new" / "judge.jsonl"
    with alone(path), pytest.raises(UserError, match="another `dsrecipes judge` is writing it"), alone(path):
        pass
    with alone(path):
        path.write_text("")
    assert [each.name for each in path.parent.iterdir()] == ["judge.jsonl"]
    with pytest.raises(UserError, match="cannot be written"), alone(path / "below"):
        pass
