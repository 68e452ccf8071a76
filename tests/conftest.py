"""Keeps the tests off the network and out of the user's caches, and gives them ranks and small models."""

from __future__ import annotations

import contextlib
import gc
import locale
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import reaper
from support.fork_server import stop_servers
from support.models import Runs, Small
from support.rank_pool import Ranks

_INHERITED = re.compile(
    "RANK|(LOCAL|GROUP|ROLE)_.*|WORLD_SIZE|MASTER_.*|(TORCHELASTIC|SLURM|OMPI|PMI|PMIX|PALS|ACCELERATE|FSDP|DEEPSPEED|DS)_.*|"
    "OMP_.*|MKL_NUM_THREADS|TORCH_DISTRIBUTED_DEBUG|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|LC_.*|LANG|LANGUAGE|"
    "MAKEFLAGS|MAKELEVEL|MAKEOVERRIDES|PYTHONOPTIMIZE|PYTHONUNBUFFERED|PYTHONWARNINGS|(HF|TRANSFORMERS|HUGGING_FACE|DSRECIPES)_.*"
)
"""Variables of the shell, the job or the `make` that the session runs in, which would reach what the tests start."""

_USE_RUNS = tuple(f"test_{name}.py" for name in "disk export parity resume saved_model stopping verify".split())

# before anything imports the hub's library, which reads these once
_CACHE = Path(tempfile.mkdtemp(prefix="dsrecipes-tests-"))
_BUILT = Path(tempfile.gettempdir(), f"dsrecipes-tests-torch-extensions-{os.getuid()}")  # kept: compiling takes minutes
for _name in filter(_INHERITED.fullmatch, list(os.environ)):
    del os.environ[_name]
_TAG = f"{os.getpid()}-{_CACHE.name}/"
os.environ |= {
    "TORCH_EXTENSIONS_DIR": str(_BUILT),
    "HF_HUB_OFFLINE": "1",
    "DSRECIPES_CACHE": str(_CACHE / "dsrecipes"),
    "HF_HOME": str(_CACHE / "hf"),
    "LC_ALL": "C.UTF-8",
    # OpenMP threads that wait for each other awake starve beside a busy process: six times the CPU time
    "OMP_WAIT_POLICY": "PASSIVE",
    reaper.TAG: _TAG,
}


def _restore_signals() -> None:
    """Start from default signal handling, whatever `nohup`, `&` in a script or a job manager left; children inherit it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # these two are Python's own
        if signal.getsignal(number) is signal.SIG_IGN:
            # a session under nohup survives its terminal, but what it starts has the default: exec resets handlers
            survives = number == signal.SIGHUP
            handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, (lambda *_: None) if survives else handler)


_restore_signals()
_HANDLERS = {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGALRM}}  # pytest-timeout's
with contextlib.suppress(locale.Error):
    locale.setlocale(locale.LC_ALL, "C.UTF-8")


def pytest_configure() -> None:
    """Have the session's processes ended with it, even where it is killed or exits in the middle of a test."""
    subprocess.Popen([sys.executable, "-S", reaper.__file__, _TAG], stdin=subprocess.PIPE, start_new_session=True)


def pytest_unconfigure() -> None:
    """End what the session started, and remove its caches."""
    stop_servers()
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Beside another process (`pytest -n 2`) the long tests come first, so that both end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("ranks") is None)


def pytest_collection_finish() -> None:
    """Keep the objects of all imports out of later garbage collections, which every run in this process asks for."""
    gc.collect()
    gc.freeze()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share fixtures go to one process: those of a file, and those of all files that use `runs`."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "runs" if file.endswith(_USE_RUNS) else file

    config.option.loadscopereorder = False  # files with many tests are not the long ones
    return Together(config, log)


def _ranks(world: int, folder: Path) -> Iterator[Ranks]:
    pool = Ranks(world, folder)
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def _environment(request: pytest.FixtureRequest) -> Iterator[None]:
    """The environment, signal handlers and processes that a test leaves do not reach the next test."""
    before = dict(os.environ)
    os.environ[reaper.TAG] = f"{_TAG}{request.node.nodeid}"
    yield
    # only what differs: a thread of an earlier test may read the environment while it is written, which C does not survive
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ |= {name: value for name, value in before.items() if os.environ.get(name) != value}
    # those of the session: a fixture of a wider scope may have called a command in this process, which set its own
    for number, handler in _HANDLERS.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    reaper.kill_tagged(f"{_TAG}{request.node.nodeid}\0")


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A pool of one worker process."""
    yield from _ranks(1, tmp_path_factory.mktemp("one-rank"))


@pytest.fixture
def fresh_rank(tmp_path: Path) -> Iterator[Ranks]:
    """A worker process of the test's own, whose heap holds no memory that earlier runs have freed."""
    yield from _ranks(1, tmp_path)


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
