"""Ranks of srun, mpirun and other launchers that give each process its rank in variables of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import Small
from support.rank_pool import Ranks as Pool
from support.tiny import refusal

from dsrecipes import cli
from dsrecipes.errors import UserError
from dsrecipes.launch.environment import Ranks, complete_ranks, read_launch
from dsrecipes.launch.task_ranks import adopt_ranks, expand_host_list, idle_tasks_note
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.log import read_log

# Slurm 22.05, `sbatch -N 2 -n 3`: the script's own environment, and what srun changes of it in the tasks of one step
BATCH = {
    "ENVIRONMENT": "BATCH", "SLURM_GTIDS": "0", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_NTASKS": "3", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "2,1",
}  # fmt: skip
STEP = BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_GTIDS": "0,1",
}  # fmt: skip
LAST = STEP | {"SLURM_GTIDS": "2", "SLURM_NODEID": "1", "SLURM_PROCID": "2"}
ONE = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1"}
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "123@1",
}  # fmt: skip
FAR = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("env", "ranks", "host"),
    [
        (STEP, Ranks(0, 0, 3, 2), "n1"),
        (STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, Ranks(1, 1, 3, 2), "n1"),
        (LAST, Ranks(2, 0, 3, 1), "n1"),
        (STEP | {"MASTER_ADDR": "ib1", "MASTER_PORT": "29500"}, Ranks(0, 0, 3, 2), "ib1"),
        (SALLOC | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, Ranks(1, 1, 2, 2), "127.0.0.1"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, Ranks(1, 1, 2, 2), "127.0.0.1"),
        (STEP | {"PMI_RANK": "0", "PMI_SIZE": "3"}, Ranks(0, 0, 3, 2), "n1"),  # srun --mpi=pmi2
        (BATCH | OPEN_MPI, Ranks(1, 1, 2, 2), "127.0.0.1"),  # mpirun in a batch script
        (FAR | {"MASTER_ADDR": "n1"}, Ranks(1, 1, 4, 2), "n1"),
        (
            {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            Ranks(3, 1, 4, 2),
            "a",
        ),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "0", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}, Ranks(0, 0, 2, 2), "127.0.0.1"),
        (STEP | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "t"}, Ranks(1, 1, 2, 2), "t"),  # torchrun
        (BATCH, Ranks(0, 0, 1, 1), "127.0.0.1"),
        (ONE, Ranks(0, 0, 1, 1), "127.0.0.1"),
        (SALLOC, Ranks(0, 0, 1, 1), "127.0.0.1"),
    ],
)  # fmt: skip
def test_ranks_of_other_launchers(env, ranks, host):
    env = dict(env)
    read_launch(env)
    assert complete_ranks(env) == ranks
    assert env["MASTER_ADDR"] == host and (
        "RANK" in env and (0 < int(env.get("MASTER_PORT", 1)) < 32768 or ranks.world == 1)
    )


def test_tasks_of_one_step_meet_at_one_port_and_steps_at_others():
    ports = []
    for env in (STEP, LAST, STEP | {"SLURM_STEP_ID": "1"}, STEP | {"SLURM_JOB_ID": "8"}):
        env = dict(env)
        adopt_ranks(env)
        ports.append(env["MASTER_PORT"])
    assert ports[0] == ports[1] and len(set(ports)) == 3


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        (FAR, r"Open MPI's mpirun started 4 processes on several machines.*MASTER_ADDR.*torchrun --nnodes.*DSR306"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, r"does not say which of them run on this machine.*torchrun.*DSR303"),
        (
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": ""},
            r"srun started 3 tasks on 2 machines.*torchrun.*DSR303",
        ),
        ({**STEP, "SLURM_GTIDS": "0,2"}, r"tasks 0,2.*srun --distribution=block.*DSR304"),
    ],
)
def test_what_cannot_be_completed_is_refused(env, problem):
    with pytest.raises(UserError, match=problem):
        adopt_ranks(dict(env))


def test_one_process_with_idle_tasks_is_noted():
    assert "1 rank, although Slurm gave this job 3 tasks: `srun python -m dsrecipes.run" in str(idle_tasks_note(BATCH))
    assert (
        idle_tasks_note(STEP)
        is idle_tasks_note(ONE)
        is idle_tasks_note(BATCH | {"RANK": "0"})
        is idle_tasks_note({})
        is None
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node[01-03,7],gpu1", ["node01", "node02", "node03", "node7", "gpu1"]),
        ("n[1-2]", ["n1", "n2"]),
        ("localhost", ["localhost"]),
        ("rack[1-2]-node[09-10].x", ["rack1-node09.x", "rack1-node10.x", "rack2-node09.x", "rack2-node10.x"]),
        ("", []),
    ],
)
def test_lists_of_machines(text, names):
    assert expand_host_list(text) == names


def test_the_command_that_starts_ranks_is_not_started_several_times(monkeypatch, capfd):
    for key, value in STEP.items():
        monkeypatch.setenv(key, value)
    message = refusal(cli.main, ["train", "gpt2_clm"], capfd)
    assert "srun started 3 copies of `dsrecipes train`" in message and "python -m dsrecipes.run" in message


@pytest.mark.ranks
def test_two_tasks_of_srun_train_one_model(two_ranks: Pool, small: Small, tmp_path: Path):
    values = small.values("gpt2", max_steps=2, output_dir=str(tmp_path / "run"))["values"]
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "dsrecipes.run", "--recipe", "gpt2_clm", "--use_cpu", "true", *words]
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[01-02]", "SLURM_NNODES": "1"}
    processes = [
        subprocess.Popen(
            command, env=os.environ | job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}, cwd=tmp_path,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "2 ranks on cpu" in said[0] and not said[1].strip()
    losses = [line["loss"] for line in read_log(RunFolder(tmp_path / "run").log) if "loss" in line]
    alone = two_ranks.run("train", **small.values("gpt2", max_steps=2, output_dir=str(tmp_path / "alone")))[0]
    assert losses == pytest.approx([line["loss"] for line in alone["log"] if "loss" in line], abs=1e-6) and len(losses) == 2
