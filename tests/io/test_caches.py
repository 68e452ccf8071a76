"""Machines with a home directory that cannot be written, a reader that ends, a GPU that torch cannot use, python -OO."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import Small
from support.tiny import ROOT

from dsrecipes.errors import UserError
from dsrecipes.io.caches import redirect_caches

SHORT = "--recipe gpt2_clm --profile full --max_steps 1 --verify_model false".split()
HOMELESS = ("DSRECIPES_CACHE", "HF_HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR")


def environment(*without: str, **values: object) -> dict[str, str]:
    """Return the environment of this process, without some variables and with others."""
    remaining = {key: value for key, value in os.environ.items() if key not in without}
    return remaining | {key: str(value) for key, value in values.items()}


def test_caches_go_where_they_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    env: dict[str, str] = {}
    assert redirect_caches(env) is None and env == {} and (home / ".cache").is_dir()
    monkeypatch.setenv("HOME", "/dev/null/x")
    note = redirect_caches(env)
    folder = tmp_path / f"dsrecipes-{os.getuid()}"
    assert note == f"/dev/null/x/.cache cannot be written; using {folder} (set DSRECIPES_CACHE to choose another)"
    assert env["XDG_CACHE_HOME"] == str(folder) and env["TRITON_CACHE_DIR"] == str(folder / "triton")
    env = {"DSRECIPES_CACHE": str(tmp_path / "mine")}
    assert redirect_caches(env) is None and env["XDG_CACHE_HOME"] == str(tmp_path / "mine")
    with pytest.raises(UserError, match="DSRECIPES_CACHE=/proc/nope.*DSR008"):
        redirect_caches({"DSRECIPES_CACHE": "/proc/nope"})
    (folder).rmdir()
    folder.symlink_to(home)
    with pytest.raises(UserError, match="belongs to another user.*DSRECIPES_CACHE.*DSR008"):
        redirect_caches({})


def test_downloaded_models_in_a_home_that_may_only_be_read_are_found(tmp_path, monkeypatch):
    hub = tmp_path / ".cache" / "huggingface" / "hub"
    hub.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("dsrecipes.io.caches._writable", lambda folder: False)  # root may write everywhere
    env: dict[str, str] = {}
    redirect_caches(env)
    assert env["HF_HUB_CACHE"] == str(hub) and "HF_TOKEN_PATH" not in env


@pytest.mark.ranks
def test_a_run_needs_no_home_directory_and_no_reader(small: Small, tmp_path: Path):
    run = tmp_path / "run"
    values = small.values("gpt2", max_steps=3, save_steps=50, output_dir=str(run))["values"]
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "dsrecipes.cli", "train", "gpt2_clm", "--procs", "2", "--use_cpu", "true", *words],
        env=environment(*HOMELESS, HOME="/proc/nope", TMPDIR=tmp_path), cwd=tmp_path,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith("recipe ")
    assert re.match(r"cache +/proc/nope/.cache cannot be written; using .*DSRECIPES_CACHE", process.stdout.readline())
    process.stdout.close()
    log = run / "log.txt"
    assert process.wait(240) == 0, log.read_text() if log.is_file() else ""
    text = log.read_text()
    assert "2 ranks on cpu" in text and "step 3/3" in text and "done      step 3" in text and "Traceback" not in text
    assert (run / "model" / "model.safetensors").is_file()


GPUS = "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)"


@pytest.fixture
def nvidia_smi(tmp_path: Path) -> Path:
    """A folder with an nvidia-smi that lists two GPUs of an old driver."""
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\ncase "$*" in *driver_version*) echo 535.104.05;; *) echo "{GPUS}";; esac\n')
    fake.chmod(0o755)
    return fake.parent


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("visible", "procs"), [({}, ["--procs", "1"]), ({"CUDA_VISIBLE_DEVICES": "GPU-gone"}, [])], ids=["all", "stale UUID"]
)
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(nvidia_smi, tmp_path, visible, procs):
    done = subprocess.run(
        [sys.executable, "-m", "dsrecipes.cli", "train", *procs, *SHORT, "--output_dir", str(tmp_path / "run")],
        env=environment("CUDA_VISIBLE_DEVICES", PATH=f"{nvidia_smi}:{os.environ['PATH']}", **visible),
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    count = "1 GPU" if visible else "2 GPUs"
    assert f"the driver (NVIDIA 535.104.05) lists {count}, but torch" in done.stderr and "--use_cpu true" in done.stderr
    assert ("CUDA_VISIBLE_DEVICES is 'GPU-gone'" in done.stderr) == bool(visible)
    assert re.search(r"\((built for|built without) .*\) cannot use (it|them): .*\S\. Install a torch", done.stderr)


@pytest.mark.ranks
def test_python_without_docstrings_is_refused():
    done = subprocess.run([sys.executable, "-OO", "-m", "dsrecipes.run", *SHORT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "python -OO" in done.stderr and len(done.stderr.splitlines()) == 1


OF_2_6 = {
    "current_accelerator", "current_device_idx", "current_stream", "device_count", "is_available", "set_device_idx",
    "set_stream", "synchronize",
}  # fmt: skip
"""What torch.accelerator has in 2.6, the oldest torch of setup.cfg; its memory functions came later (2.9)."""


def test_torch_accelerator_is_used_as_the_oldest_torch_has_it():
    used = set()
    for path in [*(ROOT / "dsrecipes").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.accelerator":
                used.add(node.attr)
    assert "torch >= 2.6" in (ROOT / "setup.cfg").read_text() and "is_available" in used and used <= OF_2_6
