"""A judge behind HTTP: its faults, and a key that goes nowhere else."""

import email.utils
import json
import time

import pytest
from support.fake_openai import completion, serve

from dsrecipes.errors import UserError
from dsrecipes.evaluation import judge_server
from dsrecipes.evaluation.judge_models import Reply, judge_folder
from dsrecipes.evaluation.judge_server import KEY, ServerJudge
from dsrecipes.runs.weights import folder_checksum

SECRET = "sk-very-secret-0123456789"


def fails_first(*faults):
    """A rule: one fault a request, then a verdict."""
    left = list(faults)
    return lambda body, headers: left.pop(0) if left else completion("VERDICT: A")


def refused(url, timeout=5.0):
    with pytest.raises(UserError) as error:
        ServerJudge(url, "m", timeout).ask("Which?", 0, 5)
    return str(error.value)


def test_what_is_sent_and_told():
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    with serve(lambda body, headers: completion("VERDICT: B", usage)) as server:
        judge = ServerJudge(server.url, "some-model", 5)
        assert judge.ask("Which?", 0, 64) == Reply("VERDICT: B", 7, 3)
        judge.ask("Which?", 2, 64)
    first, second = (body for body, _ in server.requests)
    assert first == {"model": "some-model", "messages": [{"role": "user", "content": "Which?"}], "max_tokens": 64,
                     "temperature": 0.0, "stream": False}  # fmt: skip
    assert second == first | {"temperature": 0.7, "seed": 2}


def test_a_server_that_tells_no_cost():
    with serve(fails_first()) as server:
        assert ServerJudge(server.url, None, 5).ask("Which?", 0, 5) == Reply("VERDICT: A", None, None)


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"Retry-After": "0"}, '{"error": {"message": "slow down"}}'),
        (429, {"Retry-After": email.utils.formatdate(0, usegmt=True)}, "slow down"),
        (500, {"Retry-After": "0"}, "<html>oops</html>"),
        (503, {"Retry-After": "0"}, ""),
        (504, {"Retry-After": "0"}, "{}"),
    ],
)
def test_what_passes_is_tried_again(fault, capsys):
    with serve(fails_first(fault, fault)) as server:
        assert ServerJudge(server.url, "m", 5).ask("Which?", 0, 5).text == "VERDICT: A"
    assert len(server.requests) == 3
    assert capsys.readouterr().err.count(f"judge: {fault[0]} ") == 2


def test_retry_after_is_kept():
    with serve(fails_first((429, {"Retry-After": "1"}, ""))) as server:
        began = time.monotonic()
        ServerJudge(server.url, "m", 5).ask("Which?", 0, 5)
    assert time.monotonic() - began >= 1


def test_a_wait_of_an_hour_is_told_instead():
    with serve(fails_first((429, {"Retry-After": "3600"}, ""))) as server:
        message = refused(server.url)
    assert "429 Too Many Requests; it asks to wait 3600 s" in message and "[DSR512]" in message
    assert len(server.requests) == 1


def test_what_does_not_pass_ends_with_how_to_go_on(monkeypatch):
    monkeypatch.setattr(judge_server, "_WAITS", (0, 0))
    with serve(lambda body, headers: (503, {}, '{"detail": "the model is\\nloading"}')) as server:
        message = refused(server.url)
    assert len(server.requests) == 3
    assert message == (
        f"--judge {server.url}: 503 Service Unavailable: the model is loading. "
        "What was judged is kept: the same command resumes [DSR512]"
    )
    assert "no connection" in refused(server.url)  # which is gone now


def test_no_answer_in_time(monkeypatch):
    monkeypatch.setattr(judge_server, "_WAITS", (0,))

    def slow(body, headers):
        time.sleep(0.5)
        return completion("VERDICT: A")

    with serve(slow) as server:
        assert "no answer in time" in refused(server.url, timeout=0.1)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "body", "parts"),
    [
        (401, '{"error": {"message": "Incorrect API key"}}', ["401 Unauthorized: Incorrect API key", KEY, "not set"]),
        (403, "no", ["403 Forbidden: no", KEY, "[DSR513]"]),
        (404, '{"error": "no such model"}', ["404 Not Found: no such model", "--judge_model", "/v1"]),
        (400, '{"message": "max_tokens"}', ["400 Bad Request: max_tokens"]),
        (422, '{"detail": [{"msg": "field required"}]}', ["field required"]),
        (200, "<html>welcome</html>", ["[DSR514]", "/v1"]),
        (200, '{"object": "list"}', ["[DSR514]"]),
        (200, "[]", ["[DSR514]"]),
    ],
)
def test_a_refusal_is_told_at_once(status, body, parts, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with serve(lambda *_: (status, {}, body)) as server:
        message = refused(server.url)
    assert len(server.requests) == 1 and "\n" not in message
    assert all(part in message for part in parts), message


def test_the_key_comes_from_one_variable_and_no_other_token_is_sent(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of-this-user")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-user")
    monkeypatch.delenv(KEY, raising=False)
    with serve(fails_first()) as server:
        ServerJudge(server.url, "m", 5).ask("Which?", 0, 5)
        assert "of-this-user" not in json.dumps(server.requests)
        monkeypatch.setenv(KEY, f" {SECRET}\n")
        ServerJudge(server.url, "m", 5).ask("Which?", 0, 5)
        assert server.requests[-1][1]["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("status", [200, 401, 404, 500])
def test_a_key_that_is_sent_back_is_not_told(status, monkeypatch, capsys):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(judge_server, "_WAITS", (0,))

    def echo(body, headers):
        said = headers["authorization"]
        return completion(said) if status == 200 else (status, {}, json.dumps({"error": {"message": f"bad {said}"}}))

    with serve(echo) as server:
        text = repr(ServerJudge(server.url, "m", 5).ask("Which?", 0, 5)) if status == 200 else refused(server.url)
    output = capsys.readouterr()
    assert "Bearer ***" in text and SECRET not in text + output.out + output.err


def test_a_key_that_no_header_holds_is_refused_unseen(monkeypatch):
    monkeypatch.setenv(KEY, "sk-\nsecret")
    with pytest.raises(UserError) as error:
        ServerJudge("http://127.0.0.1:9/v1", "m", 5)
    assert error.value.code == "DSR511" and "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://u:sk-1@host/v1", "https://host/v1?key=sk-1", "http:///v1", "http://h:99999/v1", "http://[/v1"]
)
def test_addresses_that_are_refused(url):
    with pytest.raises(UserError) as error:
        ServerJudge(url, "m", 5)
    assert error.value.code == "DSR510" and "sk-1" not in str(error.value)


def test_a_folder_that_is_no_judge(tmp_path):
    with pytest.raises(UserError, match="DSR500"):
        judge_folder(str(tmp_path))
    (tmp_path / "config.yaml").write_text("recipe: gpt2_clm")
    with pytest.raises(UserError, match="it is a run"):
        judge_folder(str(tmp_path))


def test_a_folders_checksum_tells_content_and_not_place(tmp_path):
    for name, content in (("a", b"x" * 3_000_000), ("b", b"x" * 3_000_000), ("c", b"x" * 2_999_999 + b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    a, b, c = (folder_checksum(tmp_path / name) for name in "abc")
    assert a == b != c
