"""What starts, watches and finds runs imports no training library: it must answer in under a second, and outlive one."""

import subprocess
import sys
from pathlib import Path

import pytest

import dsrecipes

PACKAGE = Path(dsrecipes.__file__).parent
HEAVY = ("torch", "transformers", "deepspeed", "peft", "accelerate", "datasets")


def modules(package: str) -> list[str]:
    """Names of a package's modules."""
    return [f"dsrecipes.{package}.{path.stem}" for path in (PACKAGE / package).glob("*.py") if path.stem != "__init__"]


@pytest.mark.parametrize("part", ["io", "launch", "reporting", "config.find", "config.layers", "runs.folder"])
def test_importing_it_imports_no_training_library(part):
    names = modules(part) if (PACKAGE / part).is_dir() else [f"dsrecipes.{part}"]
    assert names
    program = f"import sys, {', '.join(names)}; print(*sorted({{*{HEAVY}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
