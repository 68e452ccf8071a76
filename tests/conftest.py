"""Keeps the tests off the network and out of the user's caches, and gives them ranks and small models."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks
from small import Runs, Small

# before anything imports the hub's library, which reads these once
_CACHE = Path(tempfile.mkdtemp(prefix="dsrecipes-tests-"))
_BUILT = Path(tempfile.gettempdir(), f"dsrecipes-tests-torch-extensions-{os.getuid()}")  # kept: compiling takes minutes
os.environ |= {
    "TORCH_EXTENSIONS_DIR": str(_BUILT),
    "HF_HUB_OFFLINE": "1",
    "DSRECIPES_CACHE": str(_CACHE / "dsrecipes"),
    "HF_HOME": str(_CACHE / "hf"),
}
for _name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
    os.environ.pop(_name, None)  # `make test ARGS=...` must not reach the make of a test


def pytest_unconfigure() -> None:
    """Remove the session's caches."""
    shutil.rmtree(_CACHE, ignore_errors=True)


def _ranks(world: int, folder: Path) -> Iterator[Ranks]:
    pool = Ranks(world, folder)
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a run in this process leaves in the environment does not reach the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A pool of one worker process."""
    yield from _ranks(1, tmp_path_factory.mktemp("one-rank"))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A pool of two worker processes."""
    yield from _ranks(2, tmp_path_factory.mktemp("two-ranks"))


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A pool of four worker processes."""
    yield from _ranks(4, tmp_path_factory.mktemp("four-ranks"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Small models and data, and runs on them by name."""
    return Small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def runs(two_ranks: Ranks, small: Small, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every recipe at every stage on two ranks, each run once."""
    return Runs(two_ranks, small, tmp_path_factory.mktemp("runs"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test-matrix`."""
    parser.addoption("--whole-matrix", action="store_true", help="run all cases of test_matrix.py, not a cover of pairs")
