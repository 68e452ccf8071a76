"""An opened run: what its commands import, and with which packages hidden."""

import os
import subprocess
import sys
from pathlib import Path

from support.finished_runs import made_run
from support.tiny import ROOT, tiny_gpt2

COMMANDS = """
import sys
sys.argv[0] = "dsrecipes"  # the installed command; elsewhere nothing is hidden
from dsrecipes.cli import main
run, text = sys.argv[1:]
for argv in (["chat", run], ["generate", run, "--prompts", text, "--max_new_tokens", "1"], ["evaluate", run, "--dataset", text]):
    assert main(argv) == 0, argv
heavy = "dsrecipes.train transformers.trainer transformers.training_args peft deepspeed datasets bitsandbytes scipy".split()
print("IMPORTED", [name for name in heavy if sys.modules.get(name)])
"""


def test_commands_on_a_run_without_an_adapter_import_neither_training_nor_peft(tmp_path: Path):
    run = made_run(tmp_path / "run", "gpt2_clm", tiny_gpt2(), max_length=32)
    (tmp_path / "text.txt").write_text("The ferry left at nine. " * 10, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(run), str(tmp_path / "text.txt")],
        input="The ferry\n", capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "IMPORTED []"
