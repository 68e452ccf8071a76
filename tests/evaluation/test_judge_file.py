"""The record of a judge's work: what a restart finds, and what it refuses."""

import json

import pytest

from dsrecipes.errors import UserError
from dsrecipes.evaluation.judge_file import JudgeFile

JOB = {"items": 2, "rubric": "ab" * 32}
ANSWER = {"kind": "answer", "item": 0, "of": "run", "text": "第一行\u2028second\r\n"}
JUDGED = {"kind": "judgement", "item": 0, "order": "run first", "verdict": "A", "requests": 1}


def write(path, *lines, job=JOB):
    """Open the file, add lines and close it."""
    with JudgeFile(path, job) as file:
        file.append(*lines)
    return file


def test_what_was_written_is_found(tmp_path):
    path = tmp_path / "judge.jsonl"
    with JudgeFile(path, JOB, {"run": "runs/a"}) as file:
        file.append(ANSWER)
        file.append(JUDGED)
    with JudgeFile(path, JOB, {"run": "moved/a"}) as again:
        assert again.answers == {(0, "run"): ANSWER["text"]} and again.judgements == {(0, "run first"): JUDGED}


def test_a_torn_last_line_is_passed_over_at_every_byte(tmp_path):
    path = tmp_path / "judge.jsonl"
    write(path, ANSWER)
    whole = path.read_bytes()
    line = json.dumps(ANSWER, ensure_ascii=False).encode()
    for cut in range(1, len(line)):
        path.write_bytes(whole + line[:cut])
        assert write(path, JUDGED).answers.keys() == {(0, "run")}
        assert write(path).judgements == {(0, "run first"): JUDGED}
    assert len(path.read_bytes().splitlines()) == 3


def test_a_file_whose_first_line_is_torn_is_begun_anew(tmp_path):
    path = tmp_path / "judge.jsonl"
    write(path)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        write(path)
        assert path.read_bytes() == whole


def test_another_job_is_refused_by_name(tmp_path):
    path = tmp_path / "judge.jsonl"
    write(path, ANSWER)
    path.write_bytes(before := path.read_bytes() + b'{"kind": "ans')
    with pytest.raises(UserError, match=r"holds another job \(items: 2 there, 3 now; the rubric changed\)"):
        write(path, job={"items": 3, "rubric": "cd" * 32})
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["judge.jsonl"]


@pytest.mark.parametrize("text", ["notes", "notes\n", '{"a": 1}\n', "[1]\n", '{"kind": "answer"}\n{"kind": "ans'])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="DSR439"):
        write(path)
    assert path.read_text() == text


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "judge.jsonl"
    write(path, ANSWER)
    whole = path.read_text()
    for damaged in ("{damaged\n", '{"kind": "answer"}\n', "[1]\n"):
        path.write_text(whole + damaged + whole.splitlines()[1] + "\n")
        with pytest.raises(UserError, match="line 3: "):
            write(path)


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "new" / "judge.jsonl"
    with JudgeFile(path, JOB) as file:
        file.append(ANSWER)
        with pytest.raises(UserError, match="DSR436"):
            write(path)
        file.append(JUDGED)
    assert write(path).judgements and [each.name for each in path.parent.iterdir()] == ["judge.jsonl"]
    with pytest.raises(UserError, match="DSR438"):
        write(path / "below")
