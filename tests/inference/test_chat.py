"""chat: what the model sees of a conversation, the commands, and what a person at a terminal gets."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.finished_runs import made_run
from support.tiny import ROOT, SHARED, needs_shared, refusal, tiny_bert, tiny_gpt2, tiny_llama

from dsrecipes import UserError
from dsrecipes.cli import main
from dsrecipes.inference.chat import _speakers, chat
from dsrecipes.inference.conversation import Turn
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.inference.generate import generate
from dsrecipes.inference.session import Terminal, TextSession

LORA = {"lora_r": 4, "prompt_style": "chat"}
TITLES = """
from dsrecipes import RecipeBase

class Titles(RecipeBase):
    format_row = staticmethod(lambda row: {"title": row["title"]})
    prompt = staticmethod(lambda record, options: [(record["title"], False)])
    @staticmethod
    def encode(records, tokenizer, options):
        ids = [tokenizer(record["title"], add_special_tokens=False)["input_ids"] for record in records]
        return {"input_ids": ids, "labels": ids}
"""


def _add_adapter(run: Path, model: str) -> None:
    """An adapter that changes the answers, in place of the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    for path in (run / "model").glob("*.safetensors"):
        path.unlink()
    (run / "model" / "config.json").unlink()
    adapted.save_pretrained(run / "model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    """Runs in the tokenizer's chat template (LoRA), in Stanford's templates, of texts and of questions."""
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "chat": made_run(folder / "chat", "alpaca_llama_sft", tiny_llama(), **LORA),
        "alpaca": made_run(folder / "alpaca", "alpaca_llama_sft", tiny_llama(), prompt_style="alpaca", lora_r=0),
        "text": made_run(folder / "text", "gpt2_clm", tiny_gpt2(), max_length=64),
        "questions": made_run(folder / "questions", "bert_tmmlu_qa", tiny_bert(), max_length=64),
    }
    _add_adapter(made["chat"], tiny_llama())
    return {name: open_run(str(path)) for name, path in made.items()}


def _session(
    run: FinishedRun, lines: list[str], interactive: bool = False, **settings: object
) -> tuple[TextSession, list[str], list[str]]:
    """A session over lines, what it wrote, and its notices."""
    written: list[str] = []
    notices: list[str] = []
    waiting = iter(lines)
    terminal = Terminal(interactive, lambda label: next(waiting, None), written.append, notices.append)
    session = TextSession(run, _speakers(run, False, False), terminal, settings={"max_new_tokens": 6} | settings)
    session.talk()
    return session, written, notices


def test_a_chat_run_sees_the_turns_as_messages(runs: dict[str, FinishedRun]):
    """The second answer is that to a row of the whole chat, system text and all."""
    settings = {"max_new_tokens": 6, "suppress_tokens": list(range(300))}  # letters and blanks: words are left
    messages = chat(runs["chat"], ["Hello", "And now?"], system="Be brief.", **settings)
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[2]["content"], "an answer to build on"
    asked = generate(runs["chat"], [{"messages": messages[:2]}, {"messages": messages[:4]}], **settings)
    assert [row["answer"] for row in asked] == [messages[2]["content"], messages[4]["content"]]


def test_stanfords_templates_follow_one_another(runs: dict[str, FinishedRun]):
    """Prompt, answer, its end, prompt: what training makes of such a chat, with one beginning of text."""
    run = runs["alpaca"]
    session, _, _ = _session(run, ["Hello", "And now?"], suppress_tokens=list(range(300)))
    conversation = session.conversations["tuned"]
    answer = conversation.turns[0].answer
    assert answer, "an answer to build on"
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": text} for role, text in zip(roles, ("Hello", answer, "And now?", "x"), strict=True)]
    encoded = run.recipe.encode([{"messages": turns}], run.tokenizer, run.options)
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    end = len(run.tokenizer("x", add_special_tokens=False)["input_ids"]) + 1
    assert labels[-end - 1] == -100 and labels[-end] != -100
    conversation.turns.pop()
    prompt = conversation._prompt("And now?")
    assert prompt == ids[:-end] and prompt.count(1) == 1 and prompt.count(2) == 1


@needs_shared
@pytest.mark.parametrize("name", ["tok_qwen3", "tok_gemma"])
def test_a_chat_sends_what_training_saw(name: str, tmp_path: Path):
    """Byte for byte, with system text and two earlier turns, and it stops at the template's end token."""
    from dsrecipes.inference.answers import generation_settings

    made = made_run(
        tmp_path / "run", "alpaca_llama_sft", str(SHARED / "cases" / "models" / name), prompt_style="chat", lora_r=0
    )
    run = open_run(str(made))
    session, _, _ = _session(run, ["Hello", "And now?"])
    conversation = session.conversations["tuned"]
    conversation.system = "Be brief."
    conversation.turns = [Turn(said, text, []) for said, text in (("Hello", "Yes, one."), ("Again", "No."))]
    said = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes, one."), ("user", "Again"), ("assistant", "No.")]
    turns = [{"role": role, "content": text} for role, text in [*said, ("user", "So?"), ("assistant", "It is.")]]
    trained = run.recipe.encode([{"messages": turns}], run.tokenizer, run.options)
    ids, labels = trained["input_ids"][-1], trained["labels"][-1]
    start = max(place for place, label in enumerate(labels) if label == -100) + 1
    assert conversation._prompt("So?") == ids[:start] and "It is." in run.tokenizer.decode(ids[start:])
    assert ids[-1] in generation_settings(run, conversation.model).eos_token_id
    assert run.tokenizer.convert_ids_to_tokens(ids[-1]) in ("<|im_end|>", "<end_of_turn>")


def test_words_come_as_they_are_written(runs: dict[str, FinishedRun]):
    """In a pipe: an answer a turn, and nothing else; its pieces are the answer."""
    session, written, notices = _session(runs["alpaca"], ["Hello", "", "Again"], max_new_tokens=20)
    answers = [turn.answer for turn in session.conversations["tuned"].turns]
    assert len(written) > 4 and not notices
    assert [line.strip() for line in "".join(written).split("\n") if line.strip()] == [
        line.strip() for answer in answers for line in answer.split("\n") if line.strip()
    ]


def test_a_long_conversation_loses_its_oldest_turns(runs: dict[str, FinishedRun], tmp_path: Path):
    """It says so; /save still has them all. What never fits is refused."""
    long = "word " * 60
    session, _, notices = _session(runs["alpaca"], [long, long, long, f"/save {tmp_path / 'said.json'}"])
    assert notices[:2] == ["(the oldest turn no longer fits and is left out)"] * 2 or notices[0].startswith(
        "(the oldest turn"
    )
    assert len(json.loads((tmp_path / "said.json").read_text())[0]["messages"]) == 6
    with pytest.raises(UserError, match=r"512 positions.*DSR432"):
        _session(runs["alpaca"], ["word " * 600])


def test_commands(runs: dict[str, FinishedRun], tmp_path: Path):
    """In a terminal a mistake is reported and the chat continues."""
    file = tmp_path / "said.json"
    lines = [
        "Hello", f"/save {file}", f"/save {file}", "/reset", "/system Be brief.", "/params temperature=0.7 max_new_tokens=3",
        "/params temprature=1", "/params temperature=-1", "/params max_new_tokens=0", "/params top_k", "/rest", "/save", "/more",
        "/etc/hosts is what?", "quit", "Never said",
    ]  # fmt: skip
    session, _, notices = _session(runs["chat"], lines, interactive=True)
    conversation = session.conversations["tuned"]
    assert [turn.said for turn in conversation.turns] == ["/etc/hosts is what?"]
    assert len(conversation.turns[0].ids) <= 3
    assert conversation.system == "Be brief." and conversation.settings == {"max_new_tokens": 3, "temperature": 0.7}
    saved = json.loads(file.read_text())[0]
    assert saved["messages"][0] == {"role": "user", "content": "Hello"} and saved["model"] == "tuned"
    expected = [
        "saved to", "name another", "max_new_tokens=3", "did you mean temperature", "[DSR435]", "max_new_tokens", "[DSR448]",
        "did you mean reset", "[DSR446]", "[DSR449]",
    ]  # fmt: skip
    assert len(notices) == len(expected) and all(part in line for part, line in zip(expected, notices, strict=True)), notices


def test_a_mistake_in_a_pipe_ends_the_command(runs: dict[str, FinishedRun]):
    """So that a script notices."""
    with pytest.raises(UserError, match=r"/rest.*DSR445"):
        _session(runs["chat"], ["/rest"])


def test_a_text_goes_on(runs: dict[str, FinishedRun]):
    """Each line begins a text; /more writes what one longer answer would have."""
    short, _, _ = _session(runs["text"], ["Elsewhere", "The ferry", "/more"], max_new_tokens=5)
    long, _, _ = _session(runs["text"], ["The ferry"], max_new_tokens=10)
    ids = [turn.ids for turn in short.conversations["tuned"].turns]
    assert ids[1] + ids[2] == long.conversations["tuned"].turns[0].ids
    session, _, notices = _session(runs["text"], ["The ferry", *["/more"] * 3], max_new_tokens=100)
    assert notices and "beginning of the text" in notices[0] and len(session.conversations["tuned"].turns) == 4


def test_more_leaves_out_no_turns_of_a_text(runs: dict[str, FinishedRun]):
    """The answer becomes shorter instead, where --max_new_tokens is not below the model's positions."""
    lines = ["The ferry", "/params max_new_tokens=4096", "/more"]
    session, _, notices = _session(runs["text"], lines, max_new_tokens=5)
    assert len(session.conversations["tuned"].turns) == 2 and not any("oldest turn" in line for line in notices), notices


def test_a_tokenizer_without_eos_separates_turns_by_nothing(tmp_path: Path):
    """There is no token to add after an answer; the shipped encoders need eos, so the recipe has one of its own."""
    (tmp_path / "mine.py").write_text(TITLES)
    run = open_run(str(made_run(tmp_path / "run", str(tmp_path / "mine.py"), tiny_llama())))
    run.tokenizer.eos_token = None
    session, _, notices = _session(run, ["Hello", "Again"])
    assert len(session.conversations["tuned"].turns) == 2 and not notices


def test_base_and_tuned_side_by_side(runs: dict[str, FinishedRun]):
    """One copy of a LoRA run's model, its adapter off and on."""
    base, tuned = _speakers(runs["chat"], base=False, both=True)
    assert base.model is tuned.model
    terminal = Terminal(False, lambda label: None, lambda text: None, lambda text: None)
    session = TextSession(runs["chat"], [base, tuned], terminal, settings={"max_new_tokens": 8})
    session.take("Hello")
    alone = [chat(runs["chat"], ["Hello"], base=base, max_new_tokens=8) for base in (True, False)]
    assert [each.messages() for each in session.conversations.values()] == alone
    assert alone[0] != alone[1]


def test_questions_get_probabilities(runs: dict[str, FinishedRun]):
    """The shares of the model's four scores, each pair scored without padding."""
    import torch

    run = runs["questions"]
    options = ["零", "五十", "一百", "兩百度左右"]
    asked = chat(run, ["\t".join(["水的沸點是攝氏幾度？", *options])])[0]
    model = run.load()
    scores = []
    for option in options:
        pair = run.tokenizer("水的沸點是攝氏幾度？", option, return_tensors="pt")
        with torch.no_grad():
            scores.append(model(**{name: each[None] for name, each in pair.items()}).logits[0, 0])
    assert asked["probabilities"] == pytest.approx(torch.stack(scores).softmax(0).tolist(), abs=1e-6)
    assert asked["answer"] == "ABCD"[asked["probabilities"].index(max(asked["probabilities"]))]


def _pipe(text: str, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape"))))
    return main(["chat", *argv])


def test_a_pipe_of_questions(
    runs: dict[str, FinishedRun], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Five lines a question, or one with tabs; the same line of answers."""
    path = str(runs["questions"].folder.path)
    capfd.readouterr()
    assert _pipe("問\n一\n二\n三\n四\n問\t一\t二\t三\t四\n", monkeypatch, [path]) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert first == second and first[0] in "ABCD" and first[1:4] == " A="
    for text, message in (("問\n一\n", "found 1 [DSR455]"), ("問\t一\n", "found 1 [DSR455]"), ("\udcff\n", "[DSR451]")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape"))))
        assert message in refusal(main, ["chat", path], capfd)


def test_wrong_flags_are_refused(runs: dict[str, FinishedRun], capfd: pytest.CaptureFixture[str]):
    """Before anything is loaded."""
    path = str(runs["chat"].folder.path)
    assert "not allowed with" in refusal(main, ["chat", path, "--base", "--both"], capfd)
    assert "no such run folder" in refusal(main, ["chat", f"{path}-none"], capfd)
    assert "at least 1" in refusal(main, ["chat", path, "--max_new_tokens", "0"], capfd)


def test_a_terminal(runs: dict[str, FinishedRun], tmp_path: Path):
    """Ctrl-C ends an answer, which is kept so far; at the prompt it leaves, with exit code 0."""
    folder = shutil.copytree(runs["alpaca"].folder.path, tmp_path / "run")
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "dsrecipes.cli", "chat", str(folder), "--max_new_tokens", "400", "--temperature", "1", "--seed", "1"])  # fmt: skip
    until = _reader(fd)
    until("you> ")
    os.write(fd, b"Hello\n")
    until("tuned> ")
    until(" ")  # the first words
    os.write(fd, b"\x03")
    until("you> ")
    os.write(fd, b"/save said.json\n")
    until("saved to said.json")
    until("you> ")
    assert _left(pid, fd) == 0
    answer = json.loads((tmp_path / "said.json").read_text())[0]["messages"][1]["content"]
    whole = chat(runs["alpaca"], ["Hello"], max_new_tokens=400, temperature=1.0, seed=1)[1]["content"]
    assert answer and len(answer) < len(whole) and whole.startswith(answer.rstrip("�"))


def _left(pid: int, fd: int) -> int:
    """Press Ctrl-C until the process ends, and return its exit code.

    CPython's readline misses a Ctrl-C that comes between its prompt and its select(): the next key delivers it.
    """
    for tenths in range(400):
        if tenths % 100 == 0:  # not sooner: a second one would interrupt the interpreter that is ending
            os.write(fd, b"\x03")
        time.sleep(0.1)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
    raise AssertionError("Ctrl-C, four times in 40 s, did not end the chat")


def _reader(fd: int) -> Callable[[str], None]:
    """Waits until the terminal has shown a text; what stood before it is passed over."""
    shown = ""

    def until(text: str) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(fd, 4096).decode("utf-8", "replace")
        shown = shown.partition(text)[2]

    return until
