"""Shell completion in a real bash: commands, flags, and the values of flags that have a list of their own."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import ROOT

from dsrecipes import UserError, cli, completion
from dsrecipes.config.find import recipe_names, variant_names, zero_names
from dsrecipes.config.help import known_flags


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "dsrecipes.bash"
    code = (
        "import sys; from dsrecipes.cli import main; code = main(['--version']) or main(['completion', 'bash']); "
        "sys.exit(code or 10 * bool({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    version, _, text = done.stdout.partition("\n")
    assert re.fullmatch(r"dsrecipes \d+\.\d+\.\d+", version)
    path.write_text(text)
    return path


def complete(script: Path, line: str, cwd: Path) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    code = (
        f"source {shlex.quote(str(script))}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
        '$(complete -p dsrecipes | sed "s/.*-F \\([^ ]*\\) .*/\\1/"); printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "syntax" not in done.stderr, done.stderr
    return done.stdout.split()


def test_commands_and_values(script: Path, tmp_path: Path):
    (tmp_path / "mine.py").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "run").mkdir()
    commands = complete(script, "dsrecipes ", tmp_path)
    assert set(cli.COMMANDS) == set(commands)
    assert complete(script, "dsrecipes tr", tmp_path) == ["train"]
    assert set(complete(script, "dsrecipes train ", tmp_path)) == {*recipe_names(), "mine.py", "run"}
    assert complete(script, "dsrecipes chat ", tmp_path) == ["last", "run"]
    assert complete(script, "dsrecipes train gpt2_clm --learning", tmp_path) == ["--learning_rate"]
    assert complete(script, "dsrecipes train gpt2_clm --packing ", tmp_path) == ["true", "false"]
    assert set(complete(script, "dsrecipes train gpt2_clm --deepspeed z", tmp_path)) == set(zero_names())
    assert set(variant_names()) < set(complete(script, "dsrecipes show --config ", tmp_path))
    assert complete(script, "dsrecipes train --bnb_4bit_quant_type n", tmp_path) == ["nf4"]
    assert complete(script, "dsrecipes explain DSR643", tmp_path) == ["DSR643"]
    assert complete(script, "dsrecipes completion ", tmp_path) == ["bash", "zsh"]


def test_train_offers_every_flag_that_has_more_than_one_value(script: Path, tmp_path: Path):
    from dsrecipes.config.flags import FIXED

    flags = {flag.removeprefix("--") for flag in complete(script, "dsrecipes train gpt2_clm --", tmp_path)}
    own = {"help", "config", "profile", "procs", "max_restarts"}
    assert flags == (known_flags().keys() | own) - FIXED.keys()


@pytest.mark.parametrize("command", ["explain", *cli.run_modules()])
def test_a_command_offers_the_flags_of_its_help(script: Path, tmp_path: Path, command: str):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    listed = set(re.findall(r"^  (?:-h, )?(--\w+)", out.getvalue(), flags=re.MULTILINE))
    assert len(listed) > 1 and set(complete(script, f"dsrecipes {command} last --", tmp_path)) == listed


def test_zsh_and_no_shell(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef dsrecipes")
    for argv in ([], ["fish"], ["bash", "zsh"]):
        with pytest.raises(UserError, match="DSR643"):
            completion.main(argv, {})
