"""Every launcher line of the README starts real ranks with the same losses, and what it cannot start is an error."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsrecipes.runs.folder import RunFolder

from support.rank_pool import free_port  # isort: skip
from support.readme_blocks import launcher_lines  # isort: skip

pytestmark = pytest.mark.ranks

SMALL = (
    "--profile starter --max_steps 3 --max_length 64 --logging_steps 1 --eval_strategy no --save_strategy no --use_cpu true "
    "--verify_model false"
)
"""Makes any of the README's gpt2_clm lines short."""
DIGITS = ("step", "epoch", "loss", "grad_norm", "learning_rate")
BIN = Path(sys.executable).parent
LINES = {
    line: 2 if "2" in re.findall(r"(?:--procs|_processes|_gpus|_per_node) (\d)", line) else 1 for line in launcher_lines()
}


def command(line: str, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """A line as a user would type it: no rank in the environment, the venv's commands, nobody's launcher configuration."""
    words = shlex.split(line)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    # the fixed port of this launcher may be in use by another test
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
    # an own HF_HOME, since accelerate reads its default configuration there; ranks of several tests share the cores
    ours = {"PATH": f"{BIN}:{os.environ['PATH']}", "HF_HOME": str(folder / "hf"), "OMP_WAIT_POLICY": "PASSIVE"}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_", "PYTEST_"))}
    folder.mkdir(parents=True, exist_ok=True)
    return {"args": words, "cwd": folder, "env": clean | ours | env, "text": True}


def start(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line to its end."""
    return subprocess.run(**command(line, folder, env), capture_output=True, timeout=300)


def losses(run: Path) -> list[dict[str, float]]:
    """What each step logged, to every digit."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in DIGITS} for line in lines if "loss" in line]


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The messages meant for the user."""
    return [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line and not line.startswith(" ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def logged(folder: Path) -> dict[int, list[dict[str, float]]]:
    """What the first line of each number of ranks logged; the others must have the same."""
    return {}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.replace(" --recipe gpt2_clm", ""))
def test_a_launcher_line_of_the_readme(line: str, folder: Path, logged: dict):
    run = folder / f"line{list(LINES).index(line)}"
    done = start(f"{line} {SMALL} --output_dir {run}", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = LINES[line]
    assert done.stdout.count("DeepSpeed ZeRO-2 (zero2.json)") == 1
    assert f"{'1 rank' if ranks == 1 else '2 ranks'} on cpu" in done.stdout
    assert len(losses(run)) == 3 and losses(run) == logged.setdefault(ranks, losses(run))
    if line.startswith(("dsrecipes", "python")):  # the launchers of others have messages of their own
        assert done.stderr == ""


def test_a_command_on_a_finished_run_prints_only_its_result(folder: Path, logged: dict):
    """In a process of its own, as a user starts it; libraries print their remarks when they are imported."""
    run = folder / "line0"
    if not run.is_dir():
        pytest.skip("the launchers were not run")
    for line in (f"evaluate {run} --split train --limit 2", f"export {run} --to {folder / 'exported'}"):
        done = start(f"dsrecipes {line}", folder)
        assert done.returncode == 0 and done.stdout and done.stderr == "", done.stderr


def test_the_lines_start_one_rank_and_two():
    assert sorted(LINES.values()) == [1, 1, 2, 2, 2, 2]


def test_plain_pytorch_on_two_ranks_has_the_same_losses_and_verbose_logs_each_rank(folder: Path, logged: dict):
    run = folder / "plain"
    line = "dsrecipes train gpt2_clm --procs 2"
    done = start(f"{line} {SMALL} --deepspeed none --verbose --output_dir {run}", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain PyTorch · 2 ranks on cpu" in done.stdout and not (run / "ds_config.json").exists()
    expected = logged.get(2)
    if expected is None:
        pytest.skip("the launchers were not run")
    for ours, theirs in zip(losses(run), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    logs = [(run / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
    assert "Loading weights" in done.stdout  # library output is not hidden
    assert "[rank0]" in logs[0] and "[rank1]" in logs[1] and "[rank1]" not in logs[0]
    assert "saving the model" in logs[0] and "saving the model" not in logs[1]


def test_a_user_error_on_two_ranks_is_one_message(folder: Path):
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    done = start(f"dsrecipes train gpt2_clm --procs 2 {SMALL} --dataset {rows} --output_dir {folder / 'none'}", folder)
    assert done.returncode == 2 and len(errors(done)) == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert f"{rows}, line 2" in errors(done)[0] and "'text'" in errors(done)[0]
    done = start(f"torchrun --nproc_per_node 2 -m dsrecipes.run --recipe gpt2_clm {SMALL} --learning_rate fast", folder)
    assert done.returncode == 1
    assert [line for line in errors(done) if "--learning_rate" in line] == errors(done) and len(errors(done)) == 1


def test_verbose_shows_the_traceback_of_a_user_error(folder: Path):
    done = start(f"python -m dsrecipes.run --recipe gpt2_clm {SMALL} --learning_rate fast --verbose", folder)
    assert done.returncode == 2 and "Traceback" in done.stderr and "--learning_rate: invalid float value" in errors(done)[-1]


def test_ctrl_c_on_two_ranks_saves_and_is_one_line(folder: Path):
    run = folder / "interrupted"
    line = f"dsrecipes train gpt2_clm --procs 2 {SMALL.replace('--max_steps 3', '')} --output_dir {run}"
    out = folder / "interrupted.txt"
    with out.open("w") as file:
        process = subprocess.Popen(**command(line, folder, {}), stdout=file, stderr=file, start_new_session=True)
        while not (run / "log.jsonl").is_file() and process.poll() is None:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends
        assert process.wait(60) == 75, out.read_text()
    assert out.read_text().count("stopped by Ctrl-C (SIGINT) at step") == 1 and "Traceback" not in out.read_text()
    assert str(RunFolder(run).complete_checkpoints()[-1]) in out.read_text()


ACCELERATE_WITH_ZERO = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, offload_optimizer_device: none}
num_processes: 1
mixed_precision: 'no'
"""
RUN = "-m dsrecipes.run --recipe gpt2_clm"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            f"accelerate launch --cpu --num_processes 2 {RUN}",
            ["accelerate launch --use_deepspeed --num_processes N", "torchrun"],
        ),
        (f"accelerate launch --config_file zero.yaml {RUN}", ["zero.yaml (zero_stage", "ds_configs/zero2.json"]),
        (
            f"accelerate launch --use_deepspeed --num_processes 1 {RUN} --deepspeed none",
            ["--use_deepspeed", "--deepspeed none"],
        ),
        (f"MASTER_PORT=29512 python {RUN}", ["MASTER_PORT is set but RANK is not"]),
    ],
    ids=["one process of two", "two owners", "use_deepspeed and none", "MASTER_PORT"],
)
def test_a_request_that_cannot_run_is_an_error(line: str, parts: list[str], folder: Path):
    (folder / "zero.yaml").write_text(ACCELERATE_WITH_ZERO)
    done = start(f"{line} {SMALL.replace('--use_cpu true', '')} --output_dir {folder / 'refused'}", folder)
    assert done.returncode == (2 if line.startswith("MASTER_PORT") else 1)
    assert len(errors(done)) == 1, done.stdout + done.stderr
    assert all(part in errors(done)[0] for part in parts), errors(done)
    assert not (folder / "refused").exists()


@pytest.fixture(scope="module")
def broken(folder: Path) -> str:
    """A folder whose deepspeed does not import."""
    package = folder / "broken" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise ImportError("libcudart.so.99: cannot open shared object file")\n')
    return str(package.parent)


def test_a_deepspeed_that_does_not_import_falls_back_and_says_why(folder: Path, broken: str, logged: dict):
    run = folder / "fallback"
    done = start(f"python {RUN} {SMALL} --output_dir {run}", folder, PYTHONPATH=broken)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain PyTorch" in done.stdout and "libcudart.so.99" in done.stdout and "--require_deepspeed" in done.stdout
    for ours, theirs in zip(losses(run), logged.get(1, losses(run)), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_a_deepspeed_that_does_not_import_is_an_error_where_it_is_required(folder: Path, broken: str):
    run = folder / "required"
    done = start(f"python {RUN} {SMALL} --require_deepspeed --output_dir {run}", folder, PYTHONPATH=broken)
    assert done.returncode == 2 and not run.exists()
    assert len(errors(done)) == 1 and "does not import" in errors(done)[0] and "libcudart.so.99" in errors(done)[0]
