"""What a person types: commands, their speed, and a wrong one's exit code 2 and single message."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dsrecipes import cli
from dsrecipes.find import recipe_names, variant_names

from tiny import ROOT, refusal  # isort: skip

COMMAND = Path(sys.executable).with_name("dsrecipes")


def run_command(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*map(str, argv)], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)


@pytest.mark.parametrize(
    "argv", [["list"], ["show", "alpaca_llama_sft", "--lora_r", "8"], ["show", "--config", "qlora_qwen"]]
)
def test_list_and_show_answer_at_once_without_torch(argv):
    code = (
        f"import sys; from dsrecipes.cli import main; code = main({argv!r}); "
        "sys.exit(code or 10 * bool({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert run_command(sys.executable, "-c", code).returncode == 0
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1


def test_list_names_every_recipe_and_variant(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*recipe_names(), *variant_names()])
    assert "tatsu-lab/alpaca" in out and "google-bert/bert-base-chinese" in out and "GPU" in out


def test_show_says_where_each_value_comes_from(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: gpt2_clm\nprofile: starter\nseed: 5\nwarmup_steps: null\n")
    assert cli.main(["show", "--config", str(path), "--max_steps", "9"]) == 0
    out = capsys.readouterr().out
    lines = {line.split(":")[0]: line.partition("#")[2].strip() for line in out.splitlines()[1:]}
    assert out.startswith("# gpt2_clm, profile starter (asked for)")
    assert lines["seed"] == str(path) and lines["max_steps"] == "flag" and "warmup_steps" not in lines
    assert (lines["lr_scheduler_type"], lines["max_length"]) == ("recipe", "profile starter")
    assert yaml.safe_load(out)["from_scratch"] is True
    assert cli.main(["show", "gpt2_clm", "--all"]) == 0
    out = capsys.readouterr().out
    assert "# default" in out and "adam_beta2" in out and len(out.splitlines()) > 80


def test_help(capfd):
    assert cli.main(["--help"]) == 0 and "train RECIPE" in capfd.readouterr().out
    assert cli.main([]) == 2 and "usage" in capfd.readouterr().out
    assert cli.main(["train", "--help"]) == 0
    out = capfd.readouterr().out
    flags = "config profile max_length packing global_batch_size subjects prompt_style lora_r learning_rate verbose"
    assert all(f"--{flag}" in out for flag in ["recipe", *flags.split()])


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian", "gpt2_clm"], ["unknown command 'trian'", "did you mean train?", "list"]),
        (["train"], ["no recipe given", "gpt2_clm"]),
        (["train", "gpt2_cml"], ["unknown recipe 'gpt2_cml'", "did you mean gpt2_clm?", "qlora_zero3"]),
        (["train", "gpt2_clm", "--procs", "none"], ["--procs none"]),
        (["train", "gpt2_clm", "--procs", "0"], ["--procs 0"]),
        (["train", "gpt2_clm", "--max_restarts", "often"], ["--max_restarts often"]),
        (["train", "gpt2_clm", "again"], ["unexpected argument 'again'"]),
        (["train", "gpt2_clm", "--max_step", "3"], ["unknown key 'max_step'", "max_steps"]),
        (["train", "gpt2_clm", "--deepspeed", "zero7"], ["--deepspeed zero7", "zero3"]),
        (["train", "--config", "no.yaml"], ["--config no.yaml", "alpaca_llama3"]),
        (["show", "gpt3"], ["unknown recipe 'gpt3'"]),
        (["show", "gpt2_clm", "--max_step", "3"], ["unknown key 'max_step'", "max_steps"]),
        (["show", "gpt2_clm", "--all", "--max_steps", "x"], ["--max_steps", "'x'"]),
    ],
)
def test_a_wrong_command_is_one_line(argv, parts, capfd):
    message = refusal(cli.main, argv, capfd)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([COMMAND, "train", "alpaca_lama_sft"], ["unknown recipe", "did you mean alpaca_llama_sft?"]),
        ([COMMAND, "train", "--config", "alpaca_lama3"], ["--config alpaca_lama3", "did you mean alpaca_llama3?"]),
        ([COMMAND, "train", "--config", "setup.cfg"], ["setup.cfg, line 2"]),
        ([COMMAND, "show", "gpt2_clm", "--max_step", "3"], ["unknown key 'max_step'", "did you mean max_steps?"]),
        ([COMMAND, "train", "bert_tmmlu_qa", "--subjects", "phisics"], ["--subjects phisics", "did you mean physics?"]),
        (
            [sys.executable, "-m", "dsrecipes.run", "--recipe", "gpt2_clm", "--dataset", "no/such/rows.jsonl"],
            ["no/such/rows.jsonl", "no such file"],
        ),
    ],
    ids=["recipe", "variant", "yaml", "key", "subject", "dataset"],
)
def test_the_real_command_ends_with_code_two(argv, parts):
    done = run_command(*argv)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(part in errors[0] for part in parts), errors
