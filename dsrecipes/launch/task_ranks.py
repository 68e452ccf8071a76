"""Which rank a process has under launchers with variables of their own: srun, mpirun, jsrun and flux.

It imports nothing heavy, because the rank must be known before torch is loaded.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from dsrecipes.errors import UserError, coded

Environment = MutableMapping[str, str]
TORCHRUN = "torchrun --nnodes N --nproc_per_node M --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m dsrecipes.run ..."
_PORTS = range(15000, 30000)
"""Candidates for the rendezvous port: below those that Linux uses for outgoing connections."""


@dataclass(frozen=True)
class Task:
    """This process among those that a launcher started."""

    launcher: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str | None
    """Machine of rank 0; None where the launcher does not say."""
    job: str
    """The same text in all of these processes and in no other job's; empty where the launcher has none."""


_MPI = {
    "Open MPI's mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MVAPICH's mpirun": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MPICH's or Intel MPI's mpirun": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    "flux run": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_TASK_LOCAL_SIZE"),
}  # fmt: skip
"""Launcher -> its variables of rank, number of ranks, rank on this machine, and ranks of this machine."""
_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "JSM_NAMESPACE_ID", "FLUX_JOB_ID")
"""Variables that name the job, the same in all its processes."""


def _number(env: Environment, *keys: str) -> int | None:
    """The first of these variables that holds a whole number."""
    return next((int(env[key]) for key in keys if env.get(key, "").isdecimal()), None)


def find_task(env: Environment) -> Task | None:
    """This process as srun, mpirun or another such launcher describes it; None where it did not start several."""
    # under mpirun in a Slurm job, the job's variables do not describe this process
    return _mpi_task(env) or _slurm_task(env)


def _mpi_task(env: Environment) -> Task | None:
    for launcher, keys in _MPI.items():
        rank, world, local_rank, local_world = (_number(env, key) for key in keys)
        # one process alone needs no rank of a launcher
        if rank is None or world is None or world < 2:
            continue
        if local_rank is None and "SLURM_LOCALID" in env:
            # srun --mpi=pmi2, whose own variables say more
            continue
        if local_rank is None or local_world is None:
            raise UserError(
                "DSR303",
                f"{launcher} started {world} processes and does not say which of them run on this machine "
                f"({keys[2]}, {keys[3]}). Start the ranks with `{TORCHRUN}`",
            )
        job = next((env[key] for key in _MPI_JOBS if env.get(key)), "")
        return Task(launcher, rank, world, local_rank, local_world, None, job)
    return None


def _slurm_task(env: Environment) -> Task | None:
    """A task of an srun step of several; not the batch script's own process, nor a shell that someone types into."""
    rank, world = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if rank is None or world is None or world < 2:
        return None
    if "SLURM_STEP_ID" not in env and env.get("ENVIRONMENT") == "BATCH":
        # sbatch sets SLURM_NTASKS and SLURM_PROCID=0 for the script, which runs once
        return None
    if "SLURM_PTY_PORT" in env and os.isatty(0):
        # srun --pty bash, and a command typed there
        return None
    nodes = expand_host_list(
        env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    )
    count = _number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or len(nodes) or 1
    local_world = _tasks_of_node(env, world, count)
    local_rank = _number(env, "SLURM_LOCALID")
    if local_rank is None:
        local_rank = rank % local_world
    tasks = [int(task) for task in env.get("SLURM_GTIDS", "").split(",") if task.isdecimal()]
    # a watchdog takes the ranks of its machine to be consecutive
    if local_world > 1 and tasks and tasks != list(range(tasks[0], tasks[0] + local_world)):
        raise UserError(
            "DSR304",
            f"srun gave this machine the tasks {env['SLURM_GTIDS']}, but the ranks of a machine must be consecutive: "
            "give srun --distribution=block",
        )
    job = ".".join(filter(None, (env.get("SLURM_JOB_ID") or env.get("SLURM_JOBID"), env.get("SLURM_STEP_ID"))))
    return Task("srun", rank, world, local_rank, local_world, nodes[0] if nodes else None, job)


def _tasks_of_node(env: Environment, world: int, nodes: int) -> int:
    """How many tasks of the step run on this machine."""
    if nodes == 1:
        return world
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    # 2(x3),1: three machines with 2, one with 1
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _number(env, "SLURM_NODEID")
    if len(counts) == nodes and (node is not None or len(set(counts)) == 1):
        return counts[node or 0]
    per_node = _number(env, "SLURM_NTASKS_PER_NODE")
    if per_node and per_node * nodes == world:
        return per_node
    raise UserError(
        "DSR303",
        f"srun started {world} tasks on {nodes} machines and does not say how many run on this one "
        f"(SLURM_STEP_TASKS_PER_NODE={text}, SLURM_NODEID={env.get('SLURM_NODEID', '')}). Start the ranks with `srun "
        f"--ntasks-per-node 1 {TORCHRUN}`",
    )


def expand_host_list(text: str) -> list[str]:
    """Expand a Slurm list of machines: `node[01-03,7],gpu1` is node01, node02, node03, node7, gpu1."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        expanded = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            expanded = [name + end for name in expanded for end in ([plain] if plain else _numbers(ranges))]
        names += expanded
    return names


def _numbers(ranges: str) -> list[str]:
    """Expand `01-03,7` into 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)] if dash else [part]
    return numbers


def idle_tasks_note(env: Environment) -> str | None:
    """A note where the Slurm job has several tasks, and no srun started this process."""
    tasks = _number(env, "SLURM_NTASKS") or 1
    if "RANK" in env or tasks < 2 or find_task(env) is not None:
        return None
    note = f"1 rank, although Slurm gave this job {tasks} tasks: `srun python -m dsrecipes.run ...` starts a rank for each"
    return coded("DSR307", note)


def refuse_tasks(env: Environment) -> None:
    """Refuse to start ranks in each of several processes (UserError): each would train a model of its own."""
    task = find_task(env)
    if task is not None:
        raise UserError(
            "DSR305",
            f"{task.launcher} started {task.world} copies of `dsrecipes train`, which starts the ranks itself, so each copy "
            "would train a model of its own. Let it start the ranks: give it `python -m dsrecipes.run --recipe RECIPE ...`; "
            "or give `dsrecipes train` one task",
        )


def adopt_ranks(env: Environment) -> None:
    """Set torch's variables (RANK, WORLD_SIZE, ...) from those of srun or mpirun, unless they are set.

    Raises:
        UserError: the launcher started processes on several machines and does not say where they meet.
    """
    if "RANK" in env:
        return
    task = find_task(env)
    if task is None:
        return
    one_machine = task.local_world == task.world
    host = env.get("MASTER_ADDR") or ("127.0.0.1" if one_machine else task.host)
    # All ranks must compute the same port, without a message between them: it is derived from what they have in common.
    job = task.job or (str(os.getppid()) if one_machine else "")
    port = env.get("MASTER_PORT")
    if not port and job:
        # crc32, because Python's hash() differs between processes
        port = str(_PORTS[zlib.crc32(job.encode()) % len(_PORTS)])
    if not host or not port:
        raise UserError(
            "DSR306",
            f"{task.launcher} started {task.world} processes on several machines and does not say where they meet: set "
            f"MASTER_ADDR to the machine of rank 0 and MASTER_PORT to a free port of it (the same for all), or start them "
            f"with `{TORCHRUN}`",
        )
    env.update(
        {
            "RANK": str(task.rank),
            "WORLD_SIZE": str(task.world),
            "LOCAL_RANK": str(task.local_rank),
            "LOCAL_WORLD_SIZE": str(task.local_world),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
    )
