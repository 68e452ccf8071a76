"""What a person types: commands, their speed, and a wrong one's exit code 2 and single message."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dsrecipes import cli
from dsrecipes.config.find import recipe_names, variant_names

from support.tiny import ROOT, refusal  # isort: skip

COMMAND = Path(sys.executable).with_name("dsrecipes")


def run_command(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*map(str, argv)], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)


@pytest.mark.parametrize(
    "argv",
    [
        ["list"],
        ["show", "alpaca_llama_sft", "--lora_r", "8"],
        ["show", "--config", "qlora_qwen"],
        ["train", "--config", "qlora_qwen", "--help"],
        ["train", "gpt2_clm", "--help", "all"],
    ],
)
def test_list_and_show_answer_at_once_without_torch(argv):
    code = (
        f"import sys; from dsrecipes.cli import main; code = main({argv!r}); "
        "sys.exit(code or 10 * bool({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    seconds: list[float] = []
    while min(seconds, default=1) >= 1 and len(seconds) < 10:  # other tests run beside this one
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
    for argv in (["list", "--help"], ["show", "--help"], ["show", "-h"], ["show", "gpt2_clm", "--help"]):
        assert cli.main(argv) == 0
        assert capfd.readouterr().out.startswith(f"usage: dsrecipes {argv[0]}")


def help_of(argv, capfd):
    assert cli.main(["train", *argv]) == 0
    out = capfd.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    return out, dict(re.findall(r"^  --(\w+) ?(\S*)", out, flags=re.MULTILINE))


def test_help_shows_the_values_that_would_run(tmp_path, capfd):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: gpt2_clm\nprofile: full\nseed: 5\nwarmup_steps: null\nweight_decay: 0.25\n")
    out, values = help_of(["--config", str(path), "--max_steps", "9", "--procs", "3", "--help"], capfd)
    assert "gpt2_clm, profile full (asked for)" in out and "--weight_decay 0.25" in out
    expected = {"max_steps": "9", "seed": "5", "procs": "3", "max_length": "1024", "dataset": "Salesforce/wikitext",
                "warmup_steps": "0", "max_restarts": "0", "bf16": "true|false"}  # fmt: skip
    assert values | expected == values
    for argv in (["gpt2_clm", "-h"], ["--help", "gpt2_clm"], ["--recipe", "gpt2_clm", "--help"]):
        out, values = help_of(argv, capfd)
        assert "gpt2_clm, profile starter" in out and values["learning_rate"] == "1.0e-3" and values["max_length"] == "256"
    out, values = help_of(["--help"], capfd)
    assert (
        "gpt2_clm" in out
        and values["learning_rate"] == "5e-05"
        and values["max_length"] == "512"
        and values["dataset"] == "DATA"
    )
    assert len(values) < 30 and {"config", "profile", "procs", "max_restarts"} < values.keys()


def test_help_all_lists_every_flag_that_is_not_refused(capfd):
    import dataclasses

    from dsrecipes.config.flags import FIXED
    from dsrecipes.config.help import known_flags
    from dsrecipes.config.layers import ALIASES
    from dsrecipes.config.train_config import CONFIG_CLASSES

    fields = {field.name: field for config in CONFIG_CLASSES for field in dataclasses.fields(config) if field.init}
    assert known_flags().keys() == fields.keys()
    literal = {name: flag.default for name, flag in known_flags().items() if flag.default is not None}
    assert all(fields[name].default == default for name, default in literal.items()) and len(literal) > 80
    for argv in (["--help", "all"], ["gpt2_clm", "--help=all"], ["--recipe", "gpt2_clm", "--help", "all"]):
        out, values = help_of(argv, capfd)
        shown = fields.keys() - FIXED.keys() - ALIASES.keys()
        assert values.keys() == shown | {"config", "profile", "procs", "max_restarts"}
        groups = [line for line in out.splitlines() if line and not line.startswith((" ", "usage"))]
        assert [*groups[1:]][-9:-1] == ["model", "data", "LoRA and 4 bits", "optimization", "engine",
                                        "evaluation and saving", "logging", "resume and robustness"]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian", "gpt2_clm"], ["'trian'", "did you mean train?", "list", "DSR641"]),
        (["train"], ["gpt2_clm", "DSR035"]),
        (["train", "gpt2_cml"], ["'gpt2_cml'", "did you mean gpt2_clm?", "qlora_zero3", "DSR030"]),
        (["train", "gpt2_cml", "--help"], ["'gpt2_cml'", "did you mean gpt2_clm?", "DSR030"]),
        (["train", "gpt2_clm", "--procs", "none"], ["--procs none", "DSR044"]),
        (["train", "gpt2_clm", "--procs", "0"], ["--procs 0", "DSR044"]),
        (["train", "gpt2_clm", "--procs"], ["--procs: the value is missing", "DSR045"]),
        (["show", "gpt2_clm", "--procs"], ["--procs: the value is missing", "DSR045"]),
        (["train", "gpt2_clm", "--max_restarts", "often"], ["--max_restarts often", "DSR642"]),
        (["train", "gpt2_clm", "again"], ["'again'", "DSR033"]),
        (["train", "gpt2_clm", "--max_step", "3"], ["'max_step'", "max_steps", "DSR040"]),
        (["train", "gpt2_clm", "--deepspeed", "zero7"], ["--deepspeed zero7", "zero3", "DSR032"]),
        (["train", "--config", "no.yaml"], ["--config no.yaml", "alpaca_llama3", "DSR031"]),
        (["show", "gpt3"], ["'gpt3'", "DSR030"]),
        (["show", "gpt2_clm", "--max_step", "3"], ["'max_step'", "max_steps", "DSR040"]),
        (["show", "gpt2_clm", "--all", "--max_steps", "x"], ["--max_steps", "'x'", "DSR045"]),
    ],
)
def test_a_wrong_command_is_one_line(argv, parts, capfd):
    message = refusal(cli.main, argv, capfd)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([COMMAND, "train", "alpaca_lama_sft"], ["did you mean alpaca_llama_sft?", "DSR030"]),
        ([COMMAND, "train", "--config", "alpaca_lama3"], ["--config alpaca_lama3", "did you mean alpaca_llama3?", "DSR031"]),
        ([COMMAND, "train", "--config", "setup.cfg"], ["setup.cfg, line 2", "DSR004"]),
        ([COMMAND, "show", "gpt2_clm", "--max_step", "3"], ["'max_step'", "did you mean max_steps?", "DSR040"]),
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


@pytest.mark.parametrize("argv", [["show", "gpt2_clm"], ["list"], ["--help"], ["train", "--help", "all"]], ids=" ".join)
def test_a_reader_that_ends_early_gets_no_traceback(argv):
    words = shlex.join([sys.executable, "-m", "dsrecipes.cli", *argv])
    piped = subprocess.run(["bash", "-c", f"{words} >&- && {words} | sed q"], capture_output=True, text=True, cwd=ROOT)
    assert len(piped.stdout.splitlines()) == 1 and not piped.stderr, piped.stderr
    full = subprocess.run(["bash", "-c", f"{words} > /dev/full"], capture_output=True, text=True, cwd=ROOT)
    assert full.returncode == 2 and full.stderr == "error: the output cannot be written: No space left on device [DSR644]\n"
