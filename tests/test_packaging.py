"""The wheel and the sdist work away from the checkout, and the checkout works beside an installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.tiny import ROOT  # isort: skip

pytestmark = pytest.mark.ranks

LOAD_ALL = """
import json, sys
from dsrecipes.config import find
from dsrecipes.io.paths import starter_path
from dsrecipes.io.text import read_yaml
recipes = find.recipe_names()
for name in recipes:
    assert read_yaml(find.find_recipe(name).yaml)["starter"], name
    assert "import" not in sys.argv or find.find_recipe(name).load()
for name in find.variant_names():
    assert find.find_recipe(read_yaml(find.find_config(name))["recipe"]), name
for name in find.zero_names():
    assert "zero_optimization" in json.loads(find.find_zero(name).read_text()), name
for name in ("starter:gpt2/tokenizer.json", "starter:bert/tokenizer.json", "starter:data/prose.txt",
             "starter:data/instructions.json", "starter:data/tmmlu/physics_test.csv"):
    assert starter_path(name)
import dsrecipes
print(len(recipes), len(find.variant_names()), len(find.zero_names()), dsrecipes.__file__, find.find_recipe("gpt2_clm").yaml)
"""


def python(*words: str, cwd: Path, path: Path | str = "") -> str:
    """Standard output of Python with `path` before the installed packages."""
    env = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("README.md", "LICENSE", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for room in ("recipes", "ds_configs", "dsrecipes"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from the sdist."""
    out = tmp_path_factory.mktemp("built")
    python("-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own, without its dependencies."""
    target = tmp_path_factory.mktemp("target")
    wheel = next(built.glob("*.whl"))
    python("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel, cwd=built)
    return target


def test_the_wheel_holds_everything_under_one_name(built: Path):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dsrecipes"}
    shipped = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    kept = {
        f"dsrecipes/{p.relative_to(ROOT)}"
        for room in ("recipes", "ds_configs")
        for p in (ROOT / room).iterdir()
        if p.is_file()
    }
    kept |= {
        str(p.relative_to(ROOT)) for p in (ROOT / "dsrecipes").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert shipped == kept
    assert any(name.endswith("LICENSE") for name in names)


def test_the_sdist_holds_what_a_wheel_needs(built: Path):
    names = tarfile.open(next(built.glob("*.tar.gz"))).getnames()
    for name in ("README.md", "LICENSE", "setup.cfg", "pyproject.toml", "recipes/gpt2_clm.yaml", "ds_configs/zero3.json"):
        assert any(each.endswith(f"/{name}") for each in names), name


def test_the_wheel_runs_away_from_the_checkout(installed: Path, tmp_path: Path):
    out = python("-m", "dsrecipes.cli", "list", cwd=tmp_path, path=installed)
    for name in ("alpaca_llama_sft", "bert_tmmlu_qa", "gpt2_clm", "qlora_zero3", "seq_classification"):
        assert name in out
        assert f"# {name}, profile" in python("-m", "dsrecipes.cli", "show", name, cwd=tmp_path, path=installed)
    recipes, variants, zeros, module, yaml = python("-c", LOAD_ALL, "import", cwd=tmp_path, path=installed).split()
    assert (recipes, zeros) == ("5", "8") and int(variants) >= 7
    assert Path(module).is_relative_to(installed) and Path(yaml).is_relative_to(installed / "dsrecipes" / "recipes")
    assert (installed / "bin" / "dsrecipes").is_file()


def test_the_checkout_finds_its_recipes_beside_an_installed_wheel(source: Path, installed: Path):
    *_, module, yaml = python("-c", LOAD_ALL, cwd=source, path=installed).split()
    assert Path(module).is_relative_to(source / "dsrecipes") and Path(yaml).is_relative_to(source / "recipes")
