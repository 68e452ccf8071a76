"""An exported model loads with plain transformers and gives the logits of the live engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.models import Runs
from support.rank_cases import probe
from support.tiny import refusal
from transformers import AutoModelForCausalLM, AutoModelForMultipleChoice, AutoTokenizer

from dsrecipes import UserError, cli
from dsrecipes.publish.export import export

pytestmark = pytest.mark.ranks

LOADERS = {"bert": AutoModelForMultipleChoice}
MERGED = {"lora": "LoRA", "qlora": "QLoRA"}
WITHOUT_DEEPSPEED = """
import sys
from dsrecipes import cli
code = cli.main(["verify", sys.argv[1]]) or cli.main(["export", sys.argv[1], "--to", sys.argv[2], "--dtype", "bfloat16"])
assert "deepspeed" not in sys.modules
sys.exit(code)
"""


def logits(folder: Path, name: str) -> np.ndarray:
    """Logits of fixed ids, by plain transformers; nothing may be missing or left over."""
    model, info = LOADERS.get(name, AutoModelForCausalLM).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return probe(model, name != "bert", model.config.vocab_size)


@pytest.mark.parametrize("stage", ["none", "zero3"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "alpaca", "lora", "qlora"])
def test_an_exported_model_gives_the_live_logits(runs: Runs, tmp_path: Path, name: str, stage: str) -> None:
    run, to = runs.get(name, stage), tmp_path / "new" / "model"
    result = export(run["path"], to)
    assert (result["merged"], result["dtype"], result["path"]) == (MERGED.get(name, "none"), "float32", str(to))
    assert result["largest_difference"] < 1e-4
    np.testing.assert_allclose(logits(to, name), run["logits"], rtol=0, atol=1e-4)
    assert not list(to.glob("adapter*")) and "quantization_config" not in (to / "config.json").read_text()
    assert [path.name for path in to.parent.iterdir()] == ["model"]
    text = "Read 3 pages."
    assert AutoTokenizer.from_pretrained(to)(text) == AutoTokenizer.from_pretrained(Path(run["path"], "model"))(text)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_checkpoint_of_two_ranks_is_consolidated_as_deepspeed_does_it(runs: Runs, tmp_path: Path, stage: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run = Path(runs.get("gpt2", stage)["path"])
    result = export(str(run), tmp_path / "half", checkpoint="step5")
    assert result["largest_difference"] < 1e-4
    found = load_file(tmp_path / "half" / "model.safetensors")
    expected = get_fp32_state_dict_from_zero_checkpoint(str(run / "checkpoints" / "checkpoint-5"))
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    export(str(run), tmp_path / "whole", checkpoint="step10")
    np.testing.assert_allclose(logits(tmp_path / "whole", "gpt2"), runs.get("gpt2", stage)["logits"], rtol=0, atol=1e-5)
    assert not np.allclose(logits(tmp_path / "half", "gpt2"), runs.get("gpt2", stage)["logits"], atol=1e-3)
    card = (tmp_path / "half" / "README.md").read_text()
    assert "| step | 5 |" in card and "eval_loss" in card


@pytest.mark.parametrize("name", ["lora", "qlora"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_an_adapter_of_a_checkpoint_is_merged(runs: Runs, tmp_path: Path, name: str, stage: str) -> None:
    run = runs.get(name, stage)
    export(run["path"], tmp_path / "model", checkpoint="step10")
    np.testing.assert_allclose(logits(tmp_path / "model", name), run["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_and_several_files(runs: Runs, tmp_path: Path, dtype: str) -> None:
    run, to = runs.get("lora", "zero2"), tmp_path / "model"
    result = export(run["path"], to, dtype=dtype, max_shard_size="100KB")
    shards = sorted(to.glob("model-*.safetensors"))
    assert len(shards) > 2 and (to / "model.safetensors.index.json").is_file()
    assert {tensor.dtype for path in shards for tensor in load_file(path).values()} == {getattr(torch, dtype)}
    difference = np.abs(logits(to, "lora") - run["logits"]).max()
    assert 1e-5 < difference < result["allowed"] and 1e-5 < result["largest_difference"] < result["allowed"]


def test_the_model_card(runs: Runs, tmp_path: Path) -> None:
    run = runs.get("qlora", "zero3")
    export(run["path"], tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "tags": ["dsrecipes", "qlora_zero3"], "pipeline_tag": "text-generation"}
    assert "# license:" in card and "dequantized" in card and "### Instruction:\nName three colours." in card
    assert f"| eval_loss | {run['metrics']['eval_loss']:.4g} |" in card and "load_in_4bit: true" in card
    assert str(runs.small.folder) not in card, "paths of this machine are nobody's business"


def test_what_is_refused(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = runs.get("gpt2", "zero2")["path"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for argv, words in (
        (["--to", tmp_path / "full"], "full: the folder is not empty"),
        (["--to", tmp_path / "full" / "file"], "there is a file of this name"),
        (["--to", tmp_path / "full" / "file" / "below"], "--to"),
        (
            ["--to", tmp_path / "new", "--checkpoint", "step7"],
            "does not exist; intact ones of this run: step5, step10 [DSR533]",
        ),
        (["--to", tmp_path / "new", "--dtype", "int8"], "--dtype"),
        (["--to", tmp_path / "new", "--max_shard_size", "big"], "--max_shard_size big: "),
        ([], "--to"),
    ):
        assert words in refusal(cli.main, ["export", run, *argv], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["full"] and (tmp_path / "full" / "file").read_text() == "mine"


def test_logits_that_are_too_far_off_leave_nothing(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrecipes.runs.reference.allowed_difference", lambda *_: 1e-9)
    with pytest.raises(UserError, match="DSR534"):
        export(runs.get("lora", "zero2")["path"], tmp_path / "model", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


def test_neither_command_imports_deepspeed(runs: Runs, tmp_path: Path) -> None:
    run = runs.get("lora", "zero3")["path"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED, run, str(tmp_path / "model")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "VERIFIED  " in done.stdout and "adapter merged" in done.stdout and "largest difference" in done.stdout
