"""An honest run is VERIFIED whatever trained it; each sabotage of a copy is caught and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import STAGES, Runs, Small
from support.rank_pool import Ranks
from support.tiny import refusal
from transformers import AutoModelForCausalLM

from dsrecipes import UserError, cli
from dsrecipes.publish.verify import verify
from dsrecipes.runs.weights import checksum

pytestmark = pytest.mark.ranks

TRAINED = ("gpt2", "bert", "alpaca", "lora", "qlora")


def copied(runs: Runs, tmp_path: Path, name: str = "gpt2", stage: str = "zero2") -> Path:
    """A copy of a run folder, without its checkpoints."""
    return shutil.copytree(runs.get(name, stage)["path"], tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))


def change(path: Path, **tensors: torch.Tensor) -> None:
    """Write a file again with some tensors replaced."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | tensors, path, metadata=metadata)


def caught(run: Path) -> str:
    """What verify says, at exit code 2; a VERIFIED.json of better days is gone."""
    (run / "VERIFIED.json").write_text("{}")
    with pytest.raises(UserError) as error:
        verify(str(run))
    assert not (run / "VERIFIED.json").exists()
    return str(error.value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_of_two_ranks_is_verified(runs: Runs, name: str, stage: str) -> None:
    path = Path(runs.get(name, stage)["path"])
    result = verify(str(path))
    weights = next((path / "model").glob("*.safetensors"))
    assert result == json.loads((path / "VERIFIED.json").read_text())
    assert result["tensors"] == len(load_file(weights)) and result["step"] == 10
    assert result["largest_difference"] < 1e-5 < result["allowed"]
    assert result["files"][weights.name] == checksum(weights)
    assert set(result["files"]) == {each.name for each in (path / "model").iterdir()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["gpt2", "lora", "qlora"])
def test_a_run_of_one_rank_is_verified(one_rank: Ranks, small: Small, tmp_path: Path, name: str, stage: str) -> None:
    case = small.values(
        name, deepspeed=stage, max_steps=3, eval_strategy="no", save_strategy="no", output_dir=str(tmp_path / "run")
    )
    one_rank.run("train", **case)
    assert verify(str(tmp_path / "run"))["largest_difference"] < 1e-5


def test_a_run_verifies_itself_in_a_fresh_process(two_ranks: Ranks, small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    case = small.values("lora", deepspeed="zero3", max_steps=3, verify_model=True, save_strategy="no", output_dir=str(run))
    two_ranks.run("train", **case)
    result = json.loads((run / "VERIFIED.json").read_text())
    assert result["largest_difference"] < 1e-5 and result["step"] == 3


def test_weights_that_were_not_gathered_end_the_run_with_a_message(two_ranks: Ranks, small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    case = small.values("gpt2", deepspeed="zero3", max_steps=3, verify_model=True, save_strategy="no", output_dir=str(run))
    first, second = two_ranks.run("train_without_gathering", **case)
    assert "holds no weights" in first and "stage3_gather_16bit_weights_on_model_save" in first and str(run) in first
    assert second == "step 3" and not (run / "VERIFIED.json").exists()
    assert (run / "metrics.json").is_file() and (run / "loss_curve.png").is_file()


def test_a_file_that_is_cut_off(runs: Runs, tmp_path: Path) -> None:
    run = copied(runs, tmp_path)
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights} is truncated or damaged" in caught(run)


def test_a_flipped_bit(runs: Runs, tmp_path: Path) -> None:
    run = copied(runs, tmp_path)
    weights = run / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    message = caught(run)
    assert f"{weights}: tensor " in message and "was changed since training ended" in message


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_an_adapter_set_to_zero(runs: Runs, tmp_path: Path, name: str) -> None:
    run = copied(runs, tmp_path, name)
    weights = run / "model" / "adapter_model.safetensors"
    first = next(key for key in load_file(weights) if "lora_B" in key)
    change(weights, **{first: torch.zeros_like(load_file(weights)[first])})
    assert f"tensor {first} was changed since training ended (it is all zero)" in caught(run)


def test_an_adapter_that_training_did_not_reach(one_rank: Ranks, small: Small, tmp_path: Path) -> None:
    case = small.values("lora", max_steps=1, warmup_steps=1, save_strategy="no", output_dir=str(tmp_path / "run"))
    one_rank.run("train", **case)  # the first step of a warm-up has a learning rate of 0
    assert verify(str(tmp_path / "run"))["step"] == 1
    expected = tmp_path / "run" / "expected.safetensors"
    with safe_open(expected, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    save_file(load_file(expected), expected, metadata={"facts": json.dumps(facts | {"learned": True})})
    assert "[DSR544]" in caught(tmp_path / "run")


def test_a_tensor_of_another_run(runs: Runs, tmp_path: Path) -> None:
    run, name = copied(runs, tmp_path, "gpt2 without dropout"), "transformer.h.1.mlp.c_fc.weight"
    other = load_file(Path(runs.get("gpt2", "zero2")["path"], "model", "model.safetensors"))
    change(run / "model" / "model.safetensors", **{name: other[name]})
    assert f"tensor {name} was changed since training ended" in caught(run)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.empty(0), "is empty; ZeRO-3 writes none"),
        (torch.full((64,), torch.nan), "has NaN or infinite numbers [DSR543]"),
    ],
)
def test_a_tensor_without_numbers(runs: Runs, tmp_path: Path, tensor: torch.Tensor, words: str) -> None:
    run = copied(runs, tmp_path)
    change(run / "model" / "model.safetensors", **{"transformer.ln_f.bias": tensor})
    assert f"tensor transformer.ln_f.bias {words}" in caught(run)


def test_weights_that_were_never_those_of_the_engine(runs: Runs, tmp_path: Path) -> None:
    run, other = copied(runs, tmp_path, "gpt2 without dropout"), copied(runs, tmp_path, "gpt2")
    with safe_open(run / "expected.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(load_file(other / "expected.safetensors"), run / "expected.safetensors", metadata=metadata)
    assert "[DSR551]" in caught(run)


def test_a_shard_that_is_missing(runs: Runs, tmp_path: Path) -> None:
    run = copied(runs, tmp_path, "alpaca")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    (run / "model" / "model.safetensors").unlink()
    model.save_pretrained(run / "model", max_shard_size="150KB")
    shards = sorted((run / "model").glob("model-*.safetensors"))
    assert len(shards) > 2 and verify(str(run))["largest_difference"] < 1e-5
    shards[1].unlink()
    assert f"{shards[1]} is missing" in caught(run)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_another_tokenizer(runs: Runs, tmp_path: Path, name: str) -> None:
    run, other = copied(runs, tmp_path, name), runs.get("bert" if name == "gpt2" else "gpt2", "zero2")["path"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(other, "model", file), run / "model" / file)
    assert f"{run / 'model'}: the tokenizer " in caught(run)


def test_a_changed_configuration(runs: Runs, tmp_path: Path) -> None:
    run = copied(runs, tmp_path)
    config = run / "model" / "config.json"
    config.write_text(config.read_text().replace('"n_head": 4', '"n_head": 2'))
    assert f"{config} is missing or was changed since training ended" in caught(run)


def test_the_command(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = copied(runs, tmp_path)
    assert cli.main(["verify", str(run)]) == 0
    assert f"VERIFIED  {run / 'VERIFIED.json'}" in capfd.readouterr().out
    (run / "expected.safetensors").unlink()
    assert "nothing to verify against" in refusal(cli.main, ["verify", str(run)], capfd)
    assert "no such run folder" in refusal(cli.main, ["verify", str(tmp_path / "nowhere")], capfd)
