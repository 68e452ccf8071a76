"""Texts and files about a run: no token is written, and config.yaml repeats the run."""

import json
import sys
from types import SimpleNamespace

import pytest
import yaml
from support.tiny import arrow_file, tiny_gpt2

from dsrecipes.config.layers import layer
from dsrecipes.config.parse import build_config
from dsrecipes.data.sequences import Sequences
from dsrecipes.data.split import SplitStats
from dsrecipes.launch.environment import Ranks
from dsrecipes.runs.folder import RunFolder
from dsrecipes.train import artifacts, header
from dsrecipes.train.footer import footer
from dsrecipes.train.setup import RunSetup


def place():
    return RunSetup(Ranks(0, 0, 1, 1), "cpu", "fp32", None, None, 4, 2)


@pytest.mark.parametrize(
    "flags",
    [
        ["--hub_token", "hf_abcdef123456"], ["--hub_token=hf_abcdef123456"], ["--hub-token", "hf_abcdef123456"],
        ["--push_to_hub_token", "S3CRET"], ["--hub_token", "S3CRET"],
    ],
)  # fmt: skip
def test_no_token_is_written(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["dsrecipes", "train", "gpt2_clm", *flags, "--seed", "3"])
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef123456")
    config = build_config(layer({"recipe": "gpt2_clm", "profile": "starter", "seed": "3"}))
    artifacts.write_start(RunFolder(tmp_path), config, place())
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "hf_abcdef" not in written and "S3CRET" not in written
    assert "--seed 3" in json.loads((tmp_path / "environment.json").read_text())["command"]


def test_config_yaml_runs_the_same_again(tmp_path):
    values = {"recipe": "gpt2_clm", "profile": "starter", "model_name_or_path": tiny_gpt2(), "learning_rate": "2e-5"}
    values |= {"lr_scheduler_kwargs": '{"num_cycles": 2}', "lora_target_modules": ["a", "b"], "warmup_steps": None}
    first = build_config(layer({**values, "output_dir": "x", "overwrite_output_dir": "true"}))
    artifacts.write_start(RunFolder(tmp_path), first, place())
    again = build_config(layer({"config": str(tmp_path / "config.yaml")}))
    assert (again.model, again.data) == (first.model, first.data)
    skipped = ("output_dir", "overwrite_output_dir")
    assert {k: v for k, v in again.train.items() if k not in skipped} == {
        k: v for k, v in first.train.items() if k not in skipped
    }
    assert (
        again.layers.profile == "starter" and yaml.safe_load((tmp_path / "config.yaml").read_text())["warmup_steps"] is None
    )
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["transformers"] and environment["engine"] == "plain PyTorch"


SPELLINGS = {
    "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "model_revision": "1.10", "dataset": "2024-01-01",
    "dataset_config": "010", "time_limit": "3:50:00", "run_name": "yes", "hang_timeout": "1e2", "learning_rate": "1e-5",
    "seed": "010", "weight_decay": "1_0.5", "bf16": "off", "save_only_model": "on", "packing": "no", "eval_delay": ".5",
    "output_dir": None, "eval_steps": None, "subjects": ["1", "no", "1.10"], "deepspeed": "none", "report_to": ["none"],
    "debug": "underflow_overflow", "lr_scheduler_type": "cosine", "optim": "sgd", "optim_args": "momentum=0.5", "max_steps": "1_000",
    "lr_scheduler_kwargs": '{"num_cycles": 1e-1}', "project": "null", "global_batch_size": "8", "greater_is_better": "yes",
}  # fmt: skip


def test_config_yaml_keeps_every_kind_of_value(tmp_path):
    first = build_config(layer({"recipe": "gpt2_clm", "profile": "starter", **SPELLINGS}))
    assert (first.train["seed"], first.train["weight_decay"], first.train["bf16"]) == (10, 10.5, False)
    assert (first.train["eval_strategy"], first.train["time_limit"], first.train["max_steps"]) == ("no", "3:50:00", 1000)
    artifacts.write_start(RunFolder(tmp_path), first, place())
    again = build_config(layer({"config": str(tmp_path / "config.yaml")}))
    assert (again.model, again.data, again.train) == (first.model, first.data, first.train)


def test_metrics_are_json(tmp_path):
    artifacts.write_metrics(RunFolder(tmp_path), {"eval_loss": 1.5, "by": {"水": 1}})
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8")) == {"eval_loss": 1.5, "by": {"水": 1}}


def test_the_footer_names_result_places_and_next_commands(tmp_path):
    config = build_config(layer({"recipe": "gpt2_clm", "profile": "starter"}))
    result = SimpleNamespace(step=12, metrics={"train_loss": 2.5, "eval_loss": 2.25, "eval_perplexity": 9.4877, "x": {}})
    text = footer(config, result, RunFolder(tmp_path), 61.4)
    for part in (
        "step 12",
        "2.5",
        "2.25",
        "9.488",
        str(tmp_path / "model"),
        "loss_curve.png",
        "tensorboard --logdir",
        "--config",
    ):
        assert part in text, part


def test_the_data_line_counts_dropped_rows():
    stats = SplitStats(
        rows=1003, kept=1000, dropped={"bad row": 2, "longer than 512 tokens": 1}, tokens=5000, supervised=2500, tail=7
    )
    line = header._describe_split(
        "train", stats, Sequences(arrow_file({"input_ids": [[1, 2]] * 40, "labels": [[1, 2]] * 40}))
    )
    for part in (
        "1,000 rows in 40 sequences",
        "5,000 tokens",
        "50%",
        "last 7 tokens",
        "2 bad rows",
        "1 longer than 512 tokens",
    ):
        assert part in line, line
