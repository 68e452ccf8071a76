"""What a launcher left in the environment, completed or refused."""

import sys

import pytest

from dsrecipes.errors import UserError
from dsrecipes.launch.environment import Launch, Ranks, complete_ranks, read_launch
from dsrecipes.zero import process
from dsrecipes.zero.process import probe_deepspeed


def test_no_launcher_is_one_rank_with_a_free_port():
    ports = set()
    for _ in range(2):
        env = {"PATH": "x", "WORLD_SIZE": "8"}
        assert complete_ranks(env) == Ranks(0, 0, 1, 1)
        assert env["RANK"] == "0" and env["MASTER_ADDR"] == "127.0.0.1"
        ports.add(int(env["MASTER_PORT"]))
    assert all(1024 < port < 65536 for port in ports)


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"},
            Ranks(3, 1, 4, 2),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 1, 2, 2)),
    ],
)
def test_a_launchers_ranks_are_kept(env, ranks):
    assert complete_ranks(env) == ranks


def test_accelerates_variables_are_read_and_taken_out():
    env = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_CONFIG_DS_FIELDS": "mixed_precision", "RANK": "0", "MASTER_PORT": "1",
    }  # fmt: skip
    assert read_launch(env) == Launch(True, True, "bf16") and set(env) == {"RANK", "MASTER_PORT"}
    assert read_launch({"ACCELERATE_MIXED_PRECISION": "no"}) == Launch(False, False, None)


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"MASTER_PORT": "29500"}, ["DSR300", "dsrecipes train RECIPE --procs N", "torchrun"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["DSR301"]),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,offload_param_device"},
            ["DSR302", "zero_stage, offload_param_device", "--deepspeed none"],
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "their.json"},
            ["DSR302", "their.json"],
        ),
    ],
)
def test_a_contradicting_launch_is_refused(env, parts):
    with pytest.raises(UserError) as error:
        read_launch(env)
    assert all(part in str(error.value) for part in parts), error.value


def test_the_probe_says_why_deepspeed_cannot_start(monkeypatch):
    assert probe_deepspeed(nvme=False) is None
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: "0.15.1")
    assert "deepspeed 0.15.1 is older than 0.19.4" in probe_deepspeed(nvme=False)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "does not import (ModuleNotFoundError" in probe_deepspeed(nvme=False)

    def missing(name):
        raise process.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(process.importlib.metadata, "version", missing)
    assert probe_deepspeed(nvme=False) == "deepspeed is not installed"
