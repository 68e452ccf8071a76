"""gpt2_clm end to end in one process: the run folder, the same losses with and without DeepSpeed, resuming."""

import json
import math

import pytest
import yaml
from dsrecipes.recipes.gpt2_clm import Gpt2Clm
from support.tiny import SHARED, STARTER, needs_shared, tiny_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsrecipes import load_recipe
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.documents import LineRows
from dsrecipes.data.files import FileRows
from dsrecipes.data.load import load_splits
from dsrecipes.data.prepare import prepare
from dsrecipes.errors import UserError
from dsrecipes.io.console import Console
from dsrecipes.run import main
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.log import read_log


def values(tmp_path, **changes):
    text = tmp_path / "text.txt"
    if not text.is_file():
        text.write_text((STARTER / "data" / "prose.txt").read_text("utf-8")[:6000], encoding="utf-8")
        (tmp_path / "held.txt").write_text("A few words that were held out of the training text. " * 5)
    return {
        "profile": "starter", "use_cpu": True, "model_name_or_path": tiny_gpt2(), "dataset": str(text), "validation_split": 0,
        "eval_dataset": str(tmp_path / "held.txt"), "max_length": 64, "global_batch_size": 4, "per_device_train_batch_size": 2,
        "max_steps": 2, "logging_steps": 1, "eval_steps": 1, "save_steps": 1, "warmup_steps": 0, "deepspeed": "none",
        "verify_model": False,
    } | changes  # fmt: skip


def train(tmp_path, name, **changes):
    return load_recipe("gpt2_clm", **values(tmp_path, output_dir=str(tmp_path / name), **changes)).run()


def losses(result, key="loss"):
    return [line[key] for line in read_log(RunFolder(result.path).log) if key in line]


def test_a_run_leaves_everything_in_one_folder(tmp_path):
    result = train(tmp_path, "run")
    run = RunFolder(result.path)
    assert result.path == tmp_path / "run" and result.step == 2
    names = {path.name for path in run.path.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "log.jsonl",
        "tensorboard",
        "checkpoints",
        "model",
        "metrics.json",
        "loss_curve.png",
    } <= names
    lines = read_log(run.log)
    for line in (line for line in lines if "loss" in line):
        assert {
            "step",
            "epoch",
            "time",
            "learning_rate",
            "grad_norm",
            "samples_per_second",
            "tokens_per_second",
            "peak_memory_gb",
        } <= set(line)
    assert (
        [line["step"] for line in lines if "loss" in line]
        == [1, 2]
        == [line["step"] for line in lines if "eval_loss" in line]
    )
    assert all(math.isclose(line["eval_perplexity"], math.exp(line["eval_loss"])) for line in lines if "eval_loss" in line)
    metrics = json.loads(run.metrics.read_text())
    assert metrics["eval_loss"] == lines[-1]["eval_loss"] == result.metrics["eval_loss"]
    assert run.curve.read_bytes()[:4] == b"\x89PNG" and next(run.tensorboard.iterdir()).stat().st_size > 100
    assert [path.name for path in run.complete_checkpoints()] == ["checkpoint-1", "checkpoint-2"]
    assert not list(run.path.rglob("training_args.bin"))
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert model.config.use_cache and AutoTokenizer.from_pretrained(run.model).vocab_size == 2048
    config = yaml.safe_load(run.config.read_text())
    assert config["recipe"] == "gpt2_clm" and config["max_steps"] == 2 and "output_dir" not in config


def test_deepspeed_and_plain_torch_agree_and_follow_each_other_in_one_process(tmp_path):
    runs = {
        name: train(tmp_path, f"{n}-{name}", deepspeed=name) for n, name in enumerate(("none", "zero2", "none", "zero3"))
    }
    for key in ("loss", "eval_loss"):
        plain = losses(runs["none"], key)
        assert len(plain) == 2
        for name in ("zero2", "zero3"):
            assert losses(runs[name], key) == pytest.approx(plain, abs=1e-5)
    for name in ("zero2", "zero3"):
        written = (runs[name].path / "ds_config.json").read_text()
        assert '"auto"' not in written and json.loads(written)["zero_optimization"]["stage"] == int(name[-1])
        AutoModelForCausalLM.from_pretrained(RunFolder(runs[name].path).model)


def test_the_same_command_goes_on_after_a_death(tmp_path):
    whole = train(tmp_path, "whole", max_steps=4)
    arguments = {"max_steps": 4, "resume_from_checkpoint": "auto"}
    first = train(tmp_path, "cut", **arguments | {"max_steps": 4, "save_total_limit": 4})  # auto starts where there is none
    run = RunFolder(first.path)
    for step in (3, 4):  # as if it had died while it saved step 3
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        (checkpoint / "manifest.json").unlink()
    with run.log.open("a") as log:
        log.write('{"step": 4, "lo')
    again = train(tmp_path, "cut", **arguments)
    assert again.step == 4 and losses(again) == losses(whole) and losses(again, "eval_loss") == losses(whole, "eval_loss")
    first, second = (
        AutoModelForCausalLM.from_pretrained(RunFolder(each.path).model).state_dict() for each in (whole, again)
    )
    assert all((first[name] == second[name]).all() for name in first)


def test_an_existing_run_is_refused_or_deleted_when_told(tmp_path):
    train(tmp_path, "run", max_steps=1)
    with pytest.raises(UserError, match="exists and is not empty"):
        train(tmp_path, "run", max_steps=1)
    assert train(tmp_path, "run", max_steps=1, overwrite_output_dir=True).step == 1


def test_config_yaml_gives_the_same_losses(tmp_path):
    first = train(tmp_path, "first")
    again = load_recipe(None, config=str(first.path / "config.yaml"), output_dir=str(tmp_path / "again")).run()
    assert losses(again) == losses(first)


def test_a_dry_run_shows_everything_and_leaves_nothing(tmp_path, capfd):
    asked = values(tmp_path, output_dir=str(tmp_path / "run"), dry_run=True)
    argv = [f"--{key}={value}" for key, value in asked.items()]
    assert main(["--recipe", "gpt2_clm", *argv]) == 0
    out = capfd.readouterr().out
    for part in ("gpt2_clm", "profile starter", "rows", "tokens", "4 sequences a step = micro 2 x accumulation 2 x ranks 1",
                 "2 steps", "plain PyTorch", "fp32", "trained, 0 frozen", "first example", "⟦", "left over"):  # fmt: skip
        assert part in out, out
    assert not (tmp_path / "run").exists()


def test_the_command_shows_a_header_the_bar_and_a_footer_and_keeps_the_noise(tmp_path, capfd):
    asked = values(tmp_path, output_dir=str(tmp_path / "run"))
    assert main(["--recipe", "gpt2_clm", *[f"--{key}={value}" for key, value in asked.items()]]) == 0
    out, err = capfd.readouterr()
    for part in (
        "recipe",
        "model",
        "batch",
        "engine",
        "done",
        "validation loss",
        "perplexity",
        "tensorboard --logdir",
        "--config",
    ):
        assert part in out, out
    assert "Warning" not in out + err and "{'loss'" not in out + err and (tmp_path / "run" / "log.txt").is_file()


@needs_shared
def test_wikitext_with_the_real_tokenizer_is_trained_to_the_last_token():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    text = SHARED / "wikitext-2" / "valid.txt"
    console = Console(main=False)
    splits = prepare(
        Gpt2Clm, load_splits(str(text)), tokenizer, EncodeOptions(1024, "alpaca"),
        validation_split=0.0, seed=0, skip_bad_rows=False, console=console,
    )  # fmt: skip
    ids = [token for block in splits["train"].data["input_ids"] for token in block]
    stats = splits["train"].stats
    assert stats.tokens == len(ids) + stats.tail and stats.tail < 1024 and 240_000 < stats.tokens < 300_000
    assert ids.count(tokenizer.eos_token_id) in (59, 60)  # 60 documents; the last may end in the tail
    whole = text.read_text(encoding="utf-8").removeprefix(" \n")
    assert whole.startswith(tokenizer.decode(ids[:5000]).replace("<|endoftext|>", "")[:10_000])


def test_lines_of_the_hubs_wikitext_are_documents_again(tmp_path):
    lines = [
        " = First = \n",
        "",
        " One two .\n",
        "",
        " = = Part = = \n",
        " Three .\n",
        "",
        " = Second = \n",
        "",
        " Four .\n",
    ]
    hub = LineRows([{"text": line} for line in lines])
    file = tmp_path / "wiki.txt"
    file.write_text("".join(line or "\n" for line in lines), encoding="utf-8")
    assert LineRows.fit([{"text": line} for line in lines]) and not LineRows.fit([{"text": "plain"}])
    assert list(hub) == list(FileRows((file,)))
    assert [row["end"] for row in hub] == [True, True]
