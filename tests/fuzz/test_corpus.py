"""Inputs that once broke something: each file, name or model folder is refused with a message that says why."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fuzzing import EVIL, Bomb, holds
from support.tiny import llama_tokenizer, refusal, tiny_gpt2

from dsrecipes import UserError, cli
from dsrecipes.config.find import find_config
from dsrecipes.config.layers import layer
from dsrecipes.config.parse import build_config
from dsrecipes.config.schema import ModelConfig
from dsrecipes.data.chat_render import render
from dsrecipes.data.load import load_splits
from dsrecipes.inference.finished import FinishedRun
from dsrecipes.model.configuration import load_config
from dsrecipes.model.load import load_model
from dsrecipes.model.tokenizer import load_tokenizer
from dsrecipes.reporting.recorded import RecordedRun, is_number
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.weights import weight_files
from dsrecipes.zero.blocks import check_blocks
from dsrecipes.zero.resolve import TrainerValues, check_with_deepspeed, read_zero, resolve

from support.finished_runs import made_run  # isort: skip

pytestmark = pytest.mark.ranks  # takes ten seconds

CORPUS = Path(__file__).with_name("corpus")
YAMLS = {
    "no-date.yaml": "--learning_rate: invalid float value: '2026-13-45' (",
    "no-float.yaml": "--seed: invalid int value: 'abc' (",
    "no-timestamp.yaml": "line 1, column 7: 'abc' is no timestamp",
    "no-map.yaml": "line 1, column 7: expected a mapping node",
    "no-hex.yaml": "--seed: invalid int value: '0x_' (",
    "python-tag.yaml": "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    "holds-itself.yaml": "aliases (*name) stand for too much here",
    "alias-bomb.yaml": "aliases (*name) stand for too much here",
    "merge-bomb.yaml": "aliases (*name) stand for too much here",
    "deep.yaml": "deep.yaml: nested too deeply",
    "two-spellings.yaml": "a key is written twice, once with - and once with _",
    "date-as-key.yaml": None,  # the key is text, as it is written
    "epochs-without-end.yaml": "--num_train_epochs: invalid float value: '.inf'",
    "seed-below-0.yaml": "--seed is -1: give 0 up to 2**32 - 1",
}
ZEROS = {
    "deep-zero.json": "deep-zero.json: nested too deeply",
    "many-digits-zero.json": "many-digits-zero.json: not JSON that can be read (Exceeds the limit",
    "huge-zero.json": "global_batch_size is 999999",
    "optimizer-zero.json": "optimizer.params must be an object",
}
DATA = {
    "many-digits.jsonl": "many-digits.jsonl, line 2: not JSON that can be read (Exceeds the limit",
    "many-digits.json": "many-digits.json: not JSON that can be read (Exceeds the limit",
    "not-utf8-cut-off.jsonl.gz": "damaged gzip file",
    "not-utf8-wrong-sum.jsonl.gz": "damaged gzip file",
    "bomb.jsonl.gz": "damaged gzip file (it unpacks to more than 200 times its size)",
}


@pytest.fixture(autouse=True)
def _canary() -> Iterator[None]:
    EVIL.unlink(missing_ok=True)
    yield
    assert not EVIL.exists()


def message_of(read: Callable[[], Any]) -> str:
    """The message of the UserError that `read` raises."""
    message = holds(read)
    assert message is not None, "it was taken"
    return message


def test_every_file_of_the_corpus_has_its_message() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {*YAMLS, *ZEROS, *DATA, "surrogate.jsonl"}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml(name: str) -> None:
    def read() -> Any:
        return build_config(layer({"recipe": "gpt2_clm", "config": str(CORPUS / name)}))

    if YAMLS[name] is None:
        assert holds(read) is None
    else:
        assert YAMLS[name] in message_of(read)


@pytest.mark.parametrize("name", ZEROS)
def test_zero_json(name: str) -> None:
    path = CORPUS / name
    model = load_config(ModelConfig(model_name_or_path="starter:gpt2"), "AutoModelForCausalLM")

    def read() -> None:
        config = build_config(layer({"recipe": "gpt2_clm", "profile": "starter", "deepspeed": str(path)}))
        zero = read_zero(path)
        engine = resolve(zero, model, TrainerValues(4, 2, 1, "fp32", config.train), [])
        check_with_deepspeed(engine, path)
        check_blocks(engine, path, False)

    assert ZEROS[name] in message_of(read)


@pytest.mark.parametrize("name", DATA)
def test_data(name: str) -> None:
    assert DATA[name] in message_of(lambda: list(load_splits(str(CORPUS / name))["train"]))


def test_half_a_character_is_a_bad_row(tmp_path: Path) -> None:
    from dsrecipes.recipes.gpt2_clm import Gpt2Clm

    from dsrecipes.config.encoding import EncodeOptions
    from dsrecipes.data.prepare import prepare
    from dsrecipes.io.console import Console

    message = message_of(lambda: prepare(
        Gpt2Clm, load_splits(str(CORPUS / "surrogate.jsonl")), llama_tokenizer(), EncodeOptions(8, "alpaca"),
        validation_split=0.0, seed=0, skip_bad_rows=False, console=Console(out=io.StringIO()),
    ))  # fmt: skip
    assert "surrogate.jsonl, line 2" in message and "--skip_bad_rows" in message


@pytest.mark.parametrize("name", ["a\0b", "~nobody-of-this-name/x", "x" * 5000, "\ud800", "/proc/self/mem/x"])
@pytest.mark.parametrize("find", [find_config, load_splits, lambda name: layer({"recipe": name + ".py"})])
def test_a_name_that_no_file_can_have(find: Callable[[str], Any], name: str) -> None:
    assert message_of(lambda: find(name)).isprintable()


def test_a_message_is_short_and_does_nothing_to_a_terminal() -> None:
    assert str(UserError("\x1b[2J" + "x" * 9000)).startswith("\\x1b[2Jxxx") and len(str(UserError("x" * 9000))) < 2100
    assert str(UserError("臺灣\n\u202e\ud800")) == "臺灣\n\\u202e\\ud800"


# ---- models ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a model folder."""
    return shutil.copytree(tiny_gpt2(), tmp_path / "model")


def loaded(folder: Path, **options: Any) -> None:
    asked = ModelConfig(model_name_or_path=str(folder), **options)
    config = load_config(asked, "AutoModelForCausalLM")
    load_tokenizer(asked)
    load_model(asked, config, "AutoModelForCausalLM", torch.float32, 0, False)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_are_refused_and_where_they_are_allowed_run_no_code(model: Path, save: Callable) -> None:
    (model / "model.safetensors").rename(model.parent / "kept")
    save({"x": Bomb()}, model / "pytorch_model.bin")
    save(Bomb(), model / "training_args.bin")
    message = message_of(lambda: loaded(model))
    assert "--allow_pickle true" in message and "DSR204" in message
    assert "DSR205" in message_of(lambda: loaded(model, allow_pickle=True))
    (model.parent / "kept").rename(model / "model.safetensors")
    loaded(model)  # no file refers to the pickle next to it


def test_weights_in_an_honest_pickle_load_where_they_are_allowed(model: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    loaded(model, allow_pickle=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("auto_map", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, None),
        ("auto_map", {"AutoConfig": "somebody/else--evil.C"}, None),
        ("model_type", "evil", "cannot be loaded"),
        ("n_layer", 10**6, "n_layer is 1000000 in its config.json"),
        ("n_layer", -7, "n_layer is -7"),
        ("num_labels", 10**9, "num_labels is 1000000000"),
        ("n_embd", 0, "cannot be loaded: ZeroDivisionError"),
        ("n_embd", -1, "negative dimension"),
        ("activation_function", "os.system", "KeyError: 'os.system'"),
        ("activation_function", {"a": 1}, "Validation error"),
        ("vocab_size", 10**12, "vocab_size is 1000000000000"),
    ],
)
def test_config_json(model: Path, key: str, value: Any, message: str | None) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    if key == "auto_map":
        config["model_type"] = "evil"
    path.write_text(json.dumps(config | {key: value}))
    (model / "evil.py").write_text(f"open({str(EVIL)!r}, 'w')")
    assert (message or "comes with Python code of its own") in message_of(lambda: loaded(model))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "loop", "empty", "nul", "null", "[]", "{}"])
def test_a_path_that_is_no_file(model: Path, file: str, kind: str) -> None:
    path = model / file
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_text({"empty": "", "nul": "\0" * 100}.get(kind, kind))
    message = holds(lambda: loaded(model))
    assert message is not None or file == "tokenizer_config.json"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../../../../etc/passwd"], "'../../../../etc/passwd' is not a file of this folder"),
        (["/etc/passwd"], "'/etc/passwd' is not a file of this folder"),
        ([".."], ".. is missing"),
        ([5], "does not say which tensor"),
        ([], "it names no file"),
        (["gone.safetensors"], "gone.safetensors is missing"),
    ],
)
def test_an_index_must_name_files_of_its_folder(model: Path, names: list[Any], message: str) -> None:
    index = {"metadata": {}, "weight_map": {f"t{n}": name for n, name in enumerate(names)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in message_of(lambda: loaded(model))
    assert message in message_of(lambda: weight_files(model))


@pytest.mark.parametrize("weights", ["adapter_model.bin", "other.safetensors"])
def test_an_adapter_is_safetensors_in_the_run(tmp_path: Path, weights: str) -> None:
    run = made_run(tmp_path / "run", "gpt2_clm", tiny_gpt2(), lora_r=2)
    (run / "model" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "somebody/else", "target_modules": ["c_attn"]})
    )
    (run / "model" / "model.safetensors").rename(run / "model" / weights)
    torch.save(Bomb(), run / "model" / "adapter_model.bin")
    assert ("holds no weights" if weights.endswith("bin") else "adapter_model.safetensors is missing") in message_of(
        lambda: FinishedRun(RunFolder(run)).load()
    )


def test_a_runs_tokenizer_brings_no_code(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "gpt2_clm", tiny_gpt2())
    path = run / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    (run / "model" / "evil.py").write_text(f"open({str(EVIL)!r}, 'w')")
    holds(lambda: FinishedRun(RunFolder(run)).tokenizer)


# ---- chat templates ----


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "still not done after 1 s"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{{ 10**10**10 }}", "computes powers (**)"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ lipsum.__globals__['os'].system('touch x') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.x.y }}", "no attribute 'x'"),
        ("{{ 'a' * 100000000000000 }}", "more memory than there is"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_chat_template_ends_and_stays_in_its_sandbox(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrecipes.data.chat_render._SECONDS", 1)
    tokenizer = llama_tokenizer.__wrapped__()
    tokenizer.chat_template = template

    def read() -> None:
        try:
            render(tokenizer, [{"role": "user", "content": "2 + 2?"}], True)
        except ValueError as error:
            raise UserError(str(error)) from error

    assert message in message_of(read)


# ---- runs ----


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lines = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "loss": \xff}', b"[" * 5000, b"3", b'{"step": ' + b"9" * 400 + b"}"]
    run.log.write_bytes(b"\n".join([*lines, b'{"step": 4, "loss": 1.5}', b'{"step": 5, "lo']))
    assert [line["step"] for line in RecordedRun(run, "x").log] == [1, 4]
    assert not is_number(10**400) and not is_number(float("inf")) and is_number(10**18)


def test_a_folder_that_is_no_checkpoint_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "checkpoint-\u00b2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-\u00b2" / "manifest.json").write_text('{"files": {}}')
    assert RunFolder(tmp_path).complete_checkpoints() == []


def test_names_that_are_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/physics_\xff test\n.jsonl")
    Path(name).write_text('{"text": "Rain."}\n')
    rows = load_splits(name)["train"]
    assert list(rows) == [{"text": "Rain."}] and len(rows.fingerprint) == 64
    assert "\\udcff" in refusal(cli.main, ["show", "gpt2_clm", "--config", name.replace("\n", "")], capfd)
