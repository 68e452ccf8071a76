"""chat --web: the page answers as the terminal does, each browser for itself, and nothing leaves this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.finished_runs import made_run
from support.tiny import refusal, tiny_bert, tiny_gpt2, tiny_llama

from dsrecipes.cli import main
from dsrecipes.inference.chat import _session, _speakers, chat
from dsrecipes.inference.finished import FinishedRun, open_run

pytest.importorskip("gradio")
from gradio_client import Client  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from dsrecipes.inference.web import BrowserChat, Page  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WORDS = {"max_new_tokens": 6, "suppress_tokens": list(range(300)), "no_repeat_ngram_size": 1}
"""Answers of whole words (letters, blanks and the end are suppressed), none of which was said before."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    """Runs of chats, of instructions in Stanford's templates, of texts and of questions."""
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "chat": made_run(folder / "chat", "alpaca_llama_sft", tiny_llama(), prompt_style="chat", lora_r=0),
        "alpaca": made_run(folder / "alpaca", "alpaca_llama_sft", tiny_llama(), prompt_style="alpaca", lora_r=0),
        "text": made_run(folder / "text", "gpt2_clm", tiny_gpt2(), max_length=64),
        "questions": made_run(folder / "questions", "bert_tmmlu_qa", tiny_bert(), max_length=64),
    }
    return {name: open_run(str(path)) for name, path in made.items()}


def _page(run: FinishedRun, both: bool = False, **settings: Any) -> Page:
    speakers = _speakers(run, False, both)
    return Page(lambda terminal: _session(run, speakers, terminal, None, settings), "a run")


@contextlib.contextmanager
def _opened(page: Page) -> Iterator[str]:
    """Its address, while it is up."""
    try:
        yield page.open()
    finally:
        page.close()


def _answers(messages: list[dict[str, str]]) -> list[str]:
    return [each["content"] for each in messages if each["role"] == "assistant"]


def test_each_browser_has_its_own_conversation(runs: dict[str, FinishedRun]):
    """The answers are the terminal's; what one says, another's model does not see."""
    said = ["Hello", "And now?"]
    expected = _answers(chat(runs["chat"], said, **WORDS))
    with _opened(_page(runs["chat"], **WORDS)) as address:
        first, second = (Client(address, verbose=False) for _ in range(2))
        assert [first.predict(each, api_name="/chat") for each in said] == expected
        assert second.predict(said[1], api_name="/chat") == _answers(chat(runs["chat"], said[1:], **WORDS))[0] != expected[1]


def test_words_come_as_they_are_written(runs: dict[str, FinishedRun]):
    """Each piece continues the one before."""
    with _opened(_page(runs["chat"], **WORDS | {"max_new_tokens": 20})) as address:
        job = Client(address, verbose=False).submit("Hello", api_name="/chat")
        whole = job.result()
        pieces = job.outputs()
    assert len(pieces) > 4 and pieces[-1] == whole
    assert all(later.startswith(before) for before, later in zip(pieces, pieces[1:], strict=False))


def test_commands_are_typed(runs: dict[str, FinishedRun], tmp_path: Path):
    """Mistakes are reported in the conversation; files are not written for a page."""
    lines = {
        "/params max_new_tokens=3": "max_new_tokens=3",
        "/params temprature=1": "did you mean temperature",
        "/system Be brief.": "(done)",
        "/more": "[DSR449]",
        f"/save {tmp_path / 'said.json'}": "[DSR445]",
        "word " * 600: "512 positions",
        "/system": "(done)",
        "/reset": "(done)",
    }
    with _opened(_page(runs["alpaca"], **WORDS)) as address:
        client = Client(address, verbose=False)
        for line, text in lines.items():
            assert text in client.predict(line, api_name="/chat")
        assert client.predict("Hello", api_name="/chat") == _answers(
            chat(runs["alpaca"], ["Hello"], **WORDS | {"max_new_tokens": 3})
        )[0]  # fmt: skip
        text = client.predict("/help", api_name="/chat")
    assert "/params" in text and "/save" not in text and "quit" not in text and not (tmp_path / "said.json").exists()


def test_both_answer_in_one_message(runs: dict[str, FinishedRun]):
    """Each under its name."""
    answer = _answers(chat(runs["chat"], ["Hello"], **WORDS))[0]
    with _opened(_page(runs["chat"], both=True, **WORDS)) as address:
        assert Client(address, verbose=False).predict("Hello", api_name="/chat") == f"base: {answer}\ntuned: {answer}"


def test_a_text_goes_on(runs: dict[str, FinishedRun]):
    """Blanks at its ends stay."""
    whole = _answers(chat(runs["text"], ["The ferry"], max_new_tokens=10))[0]
    with _opened(_page(runs["text"], max_new_tokens=5)) as address:
        client = Client(address, verbose=False)
        assert "".join(client.predict(each, api_name="/chat") for each in ("The ferry", "/more")) == whole


def test_questions_get_probabilities(runs: dict[str, FinishedRun]):
    """Those of the terminal; what is missing is named."""
    texts = ["水的沸點是攝氏幾度？", "零", "五十", "一百", "兩百"]
    expected = chat(runs["questions"], ["\t".join(texts)])[0]
    with _opened(_page(runs["questions"])) as address:
        client = Client(address, verbose=False)
        shown = client.predict(*texts, api_name="/ask")
        assert shown["label"] == f"{expected['answer']} {texts['ABCD'.index(expected['answer']) + 1]}"
        shares = {each["label"][0]: each["confidence"] for each in shown["confidences"]}
        assert [shares[letter] for letter in "ABCD"] == pytest.approx(expected["probabilities"])
        with pytest.raises(AppError, match="all four options"):
            client.predict(*texts[:4], "", api_name="/ask")


def test_what_the_page_takes_back_is_forgotten(runs: dict[str, FinishedRun]):
    """Retry, undo and clear: the number of a message says what the page still shows before it."""
    run = runs["chat"]
    speakers = _speakers(run, False, False)
    talk = BrowserChat(lambda terminal: _session(run, speakers, terminal, None, WORDS), both=False)

    def said(message: str, number: int) -> list[str]:
        talk.hear(message, number)
        return [turn.said for turn in talk.session.conversations["tuned"].turns]

    assert said("one", 0) == ["one"] and said("two", 1) == ["one", "two"]
    assert said("again", 1) == ["one", "again"]
    assert said("after one that never came", 3) == ["one", "again", "after one that never came"]
    assert said("undone to there", 2) == ["one", "again", "undone to there"]
    assert said("cleared", 0) == ["cleared"]


def test_a_stopped_answer_is_kept_so_far(runs: dict[str, FinishedRun]):
    """The page closes the generator; the model ends at the next token, and the chat continues."""
    import torch

    torch.manual_seed(1)
    page = _page(runs["alpaca"], max_new_tokens=400, temperature=1.0)
    answer = page._answer("Hello", [], None)
    talk = [next(answer) for _ in range(3)][-1][1]
    answer.close()
    history = [{"role": "user", "content": "Hello"}]
    later = page._answer("/params max_new_tokens=2", history, talk)
    assert [said for said, _ in later][-1].startswith("max_new_tokens=2")
    [turn] = talk.session.conversations["tuned"].turns
    assert 2 < len(turn.ids) < 400
    page.close()


def test_mistakes_are_told_before_there_is_a_page(
    runs: dict[str, FinishedRun], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A port that is taken, flags that do not go together, gradio missing: exit code 2."""
    path = str(runs["alpaca"].folder.path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "[DSR452]" in refusal(main, ["chat", path, "--web", "--port", port], capfd)
    assert "[DSR452]" in refusal(main, ["chat", path, "--port", "8000"], capfd)
    assert "65535 [DSR452]" in refusal(main, ["chat", path, "--web", "--port", "70000"], capfd)
    text = str(runs["text"].folder.path)
    assert "[DSR447]" in refusal(main, ["chat", text, "--web", "--system", "Be brief."], capfd)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'gradio>=6.31'` [DSR458]" in refusal(main, ["chat", path, "--web"], capfd)


def test_the_command_ends_with_ctrl_c(runs: dict[str, FinishedRun], capfd: pytest.CaptureFixture[str]):
    """It listens on loopback alone, connects to nothing else, proxies or not, and ends in the midst of an answer."""
    seen: set[str] = set()
    watching = True

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "socket.connect" and args[0].family != socket.AF_UNIX:
            seen.add(args[1][0])

    sys.addaudithook(audit)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listening: list[str] = []

    def ask_and_interrupt() -> None:
        address = f"http://127.0.0.1:{port}"
        _until(lambda: b"gradio" in urllib.request.urlopen(address).read(), 120)
        connections = psutil.Process().net_connections("tcp")
        listening.extend(each.laddr.ip for each in connections if each.status == "LISTEN" and each.laddr.port == port)
        job = Client(address, verbose=False).submit("Hello", api_name="/chat")
        _until(job.outputs, 90)
        os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=ask_and_interrupt)
    asking.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there
        patch.setenv("no_proxy", "localhost")
        path = str(runs["alpaca"].folder.path)
        assert main(["chat", path, "--web", "--port", str(port), "--max_new_tokens", "450", "--temperature", "2"]) == 0
    asking.join()
    watching = False
    assert listening == ["127.0.0.1"] and seen == {"127.0.0.1"}
    assert f"http://127.0.0.1:{port}/ (for this machine alone" in capfd.readouterr().out


def _until(ready: Callable[[], Any], seconds: float) -> Any:
    """What `ready` gives once it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := ready():
                return found
        time.sleep(0.1)
    raise TimeoutError


class Browser:
    """A headless Chromium, asked through chromedriver's HTTP."""

    def __init__(self, folder: Path) -> None:
        """Start it, with a record of its requests."""
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self.driver.stdout
        line = next(line for line in self.driver.stdout if "successfully on port" in line)
        self.url = f"http://127.0.0.1:{line.rstrip().rstrip('.').rpartition(' ')[2]}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
        always = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
        }
        try:
            self.url += "/" + self.ask("", {"capabilities": {"alwaysMatch": always}})["sessionId"]
        except OSError:
            self.driver.kill()
            raise

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        """One request of the WebDriver protocol."""
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return self.ask("/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        """Into the first element of a CSS selector."""
        found = _until(lambda: self.ask("/elements", {"using": "css selector", "value": selector}), 90)
        self.ask(f"/element/{next(iter(found[0].values()))}/value", {"text": text})

    def requests(self) -> list[str]:
        """The addresses of all requests so far."""
        events = [json.loads(each["message"])["message"] for each in self.ask("/se/log", {"type": "performance"})]
        return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            self.ask("", method="DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Closed at the end."""
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver")
def test_a_browser_talks_and_asks_no_other_host(runs: dict[str, FinishedRun], browser: Browser):
    """A message typed, its answer shown as it is, markup and all; each request goes to the page's own server."""
    answer = _answers(chat(runs["chat"], ["Hello"], **WORDS))[0]
    with _opened(_page(runs["chat"], **WORDS)) as address:
        browser.ask("/url", {"url": address})
        browser.type("textarea", "Hello\n")
        _until(lambda: answer in browser.run("return document.body.innerText"), 90)
        browser.type("textarea:not([disabled])", "/params <unk>\n")
        _until(lambda: "/params <unk>: write" in browser.run("return document.body.innerText"), 90)
        requests = browser.requests()
    assert len(requests) > 10
    assert [each for each in requests if not each.startswith((address, "data:", "blob:", "chrome://"))] == []
    errors = [each["message"] for each in browser.ask("/se/log", {"type": "browser"}) if each["level"] == "SEVERE"]
    assert errors == []
