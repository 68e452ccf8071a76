"""`judge` on a real run: what is counted, what a restart finds, and a kill half way before transformers' own server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from support.fake_openai import completion, pair, serve
from support.rank_pool import free_port
from support.tiny import instructions, llama_tokenizer, refusal, tiny_llama, write_rows

from dsrecipes import load_recipe
from dsrecipes.cli import main
from dsrecipes.errors import UserError
from dsrecipes.evaluation.judge import judge
from dsrecipes.evaluation.judge_server import KEY

SHORT = "{question}\n1 {answer_a}\n2 {answer_b}\nVERDICT: X"
"""A rubric that a model of 512 positions has room for."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of LoRA on a tiny Llama."""
    folder = tmp_path_factory.mktemp("judge")
    rows = write_rows(folder / "train.json", instructions(24))
    return load_recipe(
        "alpaca_llama_sft", model_name_or_path=tiny_llama(), dataset=rows, prompt_style="chat", max_length=256,
        validation_split=0.2, lora_r=4, learning_rate=0.05, max_steps=4, deepspeed="none", use_cpu=True,
        save_strategy="no", verify_model=False, output_dir=str(folder / "run"), global_batch_size=4, per_device_train_batch_size=4,
    ).run().path  # fmt: skip


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, trained to say `VERDICT: A` whatever it is asked."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("biased"), llama_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    said = tokenizer("VERDICT: A</s>", add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        row = instructions(24)[step % 24]
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": SHORT.replace("{question}", row["instruction"])}], add_generation_prompt=True
        )["input_ids"]
        ids = torch.tensor([asked + said])
        model(input_ids=ids, labels=torch.tensor([[-100] * len(asked) + said])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Six rows, a short rubric and a record of this test's own."""
    (tmp_path / "rubric.txt").write_text(SHORT)
    prompts = write_rows(tmp_path / "rows.jsonl", instructions(6))
    return {"prompts": prompts, "rubric": str(tmp_path / "rubric.txt"), "out": str(tmp_path / "judge.jsonl")}


def lines(path: str, kind: str) -> list[dict]:
    return [line for line in map(json.loads, Path(path).read_text("utf-8").splitlines()) if line["kind"] == kind]


def opinion(body, headers):
    """A judge that prefers what is called good to what is not, and that to what is called bad, wherever it stands."""
    a, b = (("good" in answer) - ("bad" in answer) for answer in pair(body["messages"][0]["content"]))
    verdict = "A" if a > b else "B" if b > a else "TIE"
    return completion(f"So be it.\nVERDICT: {verdict}", {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12})


def test_wins_and_losses_of_a_judge_with_an_opinion(run, files, tmp_path):
    rows = [{"instruction": f"Say {n}.", "output": "good" if n < 2 else "bad"} for n in range(6)]
    prompts = write_rows(tmp_path / "good-and-bad.json", rows)
    with serve(opinion) as server:
        result = judge(str(run), judge=server.url, judge_model="m", against="reference", max_new_tokens=12, prompts=prompts,
                       out=files["out"])  # fmt: skip
    assert {name: result[name] for name in ("items", "wins", "losses", "ties", "inconsistent", "unparsed")} == {
        "items": 6, "wins": 4, "losses": 2, "ties": 0, "inconsistent": 0, "unparsed": 0,
    }  # fmt: skip
    assert result["win_rate"] == 4 / 6
    assert (result["requests"], result["prompt_tokens"], result["completion_tokens"]) == (13, 130, 26)
    assert "[Request]\nSay 0.\n" in server.prompts()[1] and "[user]" not in server.prompts()[1]


def test_a_judge_that_looks_at_the_place_decides_nothing(run, biased, files):
    result = judge(str(run), judge=str(biased), max_new_tokens=12, judge_tokens=16, **files)
    assert result["inconsistent"] == 6 and result["win_rate"] == 0.5 and result["verdicts"] == {"A": 12, "B": 0, "TIE": 0}
    said = len(llama_tokenizer()("VERDICT: A</s>", add_special_tokens=False)["input_ids"])
    assert result["requests"] == 12 and result["completion_tokens"] == 12 * said
    assert {each["replies"][0] for each in lines(files["out"], "judgement")} == {"VERDICT: A"}


def test_a_judge_that_cannot_say_it_is_counted_and_not_guessed(run, files, capsys):
    arguments = [
        str(run),
        "--judge",
        tiny_llama(),
        "--retries",
        "1",
        "--judge_tokens",
        "8",
        "--max_new_tokens",
        "8",
        "--limit",
        "3",
    ]
    flags = [word for name, value in files.items() for word in (f"--{name}", value)]
    assert main(["judge", *arguments, *flags]) == 0
    output = capsys.readouterr().out
    assert "3 unparsed" in output and "win rate  none" in output and "cost      12 requests" in output
    assert all(each["verdict"] is None and len(each["replies"]) == 2 for each in lines(files["out"], "judgement"))


def test_by_likelihood_a_small_model_has_a_verdict(run, biased, files):
    result = judge(str(run), judge=str(biased), verdict="likelihood", max_new_tokens=12, judge_tokens=16, **files)
    assert result["inconsistent"] == 6 and result["verdicts"] == {"A": 12, "B": 0, "TIE": 0}
    assert result["requests"] == 12 and result["completion_tokens"] == 0
    reply = lines(files["out"], "judgement")[0]["replies"][0]
    assert reply.startswith("log-likelihoods: A -0.") and reply.endswith("\nVERDICT: A")


def test_equal_answers_cost_nothing(run, files):
    with serve(opinion) as server:
        result = judge(
            str(run), judge=server.url, against=str(run), max_new_tokens=8, prompts=files["prompts"], out=files["out"]
        )
    assert result["ties"] == 6 and len(server.requests) == result["requests"] == 1  # the first, before any answer is written


def test_what_is_done_is_not_done_again(run, files, monkeypatch):
    monkeypatch.setenv(KEY, "sk-very-secret")
    refuse_at = [8]

    def fails_later(body, headers):
        refuse_at[0] -= 1
        return opinion(body, headers) if refuse_at[0] else (401, {}, f"who is {headers['authorization']}?")

    del files["rubric"]
    with serve(fails_later) as server:
        asked = {"judge": server.url, "max_new_tokens": 12, **files}
        with pytest.raises(UserError, match=r"401 Unauthorized: who is Bearer \*\*\*"):
            judge(str(run), **asked)
        kept = Path(files["out"]).read_bytes()
        assert len(lines(files["out"], "judgement")) == 6
        with pytest.raises(UserError, match="max_new_tokens: 12 there, 13 now.*DSR437"):
            judge(str(run), **asked | {"max_new_tokens": 13})
        result = judge(str(run), **asked)
        again = judge(str(run), **asked)
    assert result == again and len(server.requests) == 14 == result["requests"] + 1  # the refused one is in no record
    assert len(set(server.prompts()[1:])) == 12
    assert Path(files["out"]).read_bytes().startswith(kept)
    assert not [path for path in Path(files["out"]).parent.rglob("*") if b"very-secret" in path.read_bytes()]


def test_without_a_file_of_prompts_the_rows_held_out_are_asked(run, files):
    with serve(opinion) as server:
        judge(str(run), judge=server.url, max_new_tokens=4, out=files["out"])
    trained_on = Path(run.parent, "train.json").read_text()
    asked = {prompt.split("[Request]\n")[1].split("\n[End")[0] for prompt in server.prompts()[1:]}
    assert len(asked) == 5 and all(json.dumps(each) in trained_on for each in asked)
    assert len(lines(files["out"], "answer")) == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "nowhere"], "[DSR500]"),
        (["--judge", "http://x/v1", "--against", "nowhere"], "nowhere: no such run folder"),
        (["--judge", "http://x/v1", "--limit", "0"], "--limit 0: give 1 or more [DSR490]"),
        (["--judge", "http://x/v1", "--prompts", "none.json"], "[DSR492]"),
        (["--judge", "http://x/v1", "--rubric", "none.txt"], "--rubric: none.txt: cannot be read"),
        (["--judge", "http://x/v1", "--verdict", "likelihood"], "[DSR491]"),
        ([], "the following arguments are required: --judge"),
    ],
)
def test_a_wrong_command_line(run, flags, message, capfd):
    assert message in refusal(main, ["judge", str(run), *flags], capfd)


def test_rows_that_do_not_fit(run, tmp_path, capfd):
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Why?", "output": ""}])
    asked = ["judge", str(run), "--judge", "http://127.0.0.1:9/v1", "--prompts", rows]
    assert (message := refusal(main, [*asked, "--against", "reference"], capfd)).endswith("[DSR494]"), message
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Why?"}, {"title": "Why?"}])
    assert "line 2: no known format of rows: the row has title" in refusal(main, asked, capfd)


@pytest.mark.ranks
def test_killed_half_way_before_a_real_server_each_pair_is_judged_once(run, biased, files, tmp_path):
    port = free_port()
    serve_bin = Path(sys.executable).with_name("transformers")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", KEY: "sk-very-secret"}
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen([serve_bin, "serve", biased, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
                                  stdout=log, stderr=log, env=environment)  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "server.log")
        asked = {
            "judge": f"http://127.0.0.1:{port}/v1",
            "judge_model": str(biased),
            "max_new_tokens": 12,
            "judge_tokens": 16,
        }
        flags = [word for name, value in {**files, **asked}.items() for word in (f"--{name}", str(value))]
        first = subprocess.Popen([sys.executable, "-m", "dsrecipes.cli", "judge", run, *flags], env=environment)
        while not Path(files["out"]).exists() or len(_whole(files["out"])) < 5:
            assert first.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
        kept = Path(files["out"]).read_bytes()
        before = len(_whole(files["out"]))
        assert 5 <= before < 12
        result = judge(str(run), **files, **asked)
    finally:
        server.terminate()
        server.wait(30)
    assert Counter((each["item"], each["order"]) for each in lines(files["out"], "judgement")) == Counter(
        (item, order) for item in range(6) for order in ("run first", "other first")
    )
    assert Path(files["out"]).read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert result["inconsistent"] == 6 and result["requests"] == 13 and result["prompt_tokens"] > 0
    assert not [path for path in tmp_path.rglob("*") if b"very-secret" in path.read_bytes()]


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server answers."""
    for _ in range(1200):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def _whole(path: str) -> list[bytes]:
    """The judgements on whole lines."""
    return [line for line in Path(path).read_bytes().split(b"\n")[:-1] if b'"judgement"' in line]
