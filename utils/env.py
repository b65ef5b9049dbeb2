"""What the launcher says about this process: rank, world, job, restarts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from utils.errors import EnvironmentProblem

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A step's own counts: the batch shell has SLURM_PROCID and SLURM_NTASKS too, but is no rank.
SLURM_STEP = (
    "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of one run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str  # single, torchrun or slurm


def world(environ: Mapping[str, str] = os.environ) -> World:
    """The place of this process: torchrun's variables first, then a Slurm step's, else a single process.

    Raises: EnvironmentProblem naming the variables when only some of a launcher's are set.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        _complete(TORCHRUN, environ, "torchrun")
        rank, size, local_rank, local_size = (int(environ[name]) for name in TORCHRUN[:4])
        return World(rank, size, local_rank, local_size, "torchrun")
    if "SLURM_STEP_ID" in environ:
        _complete(SLURM_STEP, environ, "srun")
        local_size = _tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], int(environ["SLURM_NODEID"]))
        return World(
            int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_LOCALID"]),
            local_size, "slurm",
        )  # fmt: skip
    return World(0, 1, 0, 1, "single")


def job_id(environ: Mapping[str, str] = os.environ) -> str:
    """The Slurm job's id; without Slurm the process id that all ranks of a run share."""
    if "SLURM_JOB_ID" in environ:
        return environ["SLURM_JOB_ID"]
    return str(os.getppid() if "RANK" in environ else os.getpid())


def in_slurm(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `job_id` is the id of a Slurm job."""
    return "SLURM_JOB_ID" in environ


def step_id(environ: Mapping[str, str] = os.environ) -> str:
    """The Slurm step within the job."""
    return environ.get("SLURM_STEP_ID", "0")


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has requeued this job."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


def _complete(names: tuple[str, ...], environ: Mapping[str, str], launcher: str) -> None:
    if missing := [name for name in names if name not in environ]:
        raise EnvironmentProblem(
            f"half of {launcher}'s variables are set: {', '.join(missing)} missing; "
            f"unset the others or start with {launcher}"
        )


def _tasks_on_node(description: str, node: int) -> int:
    """`2(x3),1` -> tasks on node `node`."""
    counts: list[int] = []
    for part in description.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise EnvironmentProblem(f"SLURM_STEP_TASKS_PER_NODE={description!r}: not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node]
