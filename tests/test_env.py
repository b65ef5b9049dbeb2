"""Ranks from launchers' variables."""

from __future__ import annotations

import pytest

from utils import env
from utils.errors import EnvironmentProblem

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1",
}  # fmt: skip
STEP = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,1",
}  # fmt: skip


def test_a_bare_process_is_one_rank() -> None:
    assert env.world({}) == env.World(0, 1, 0, 1, "single")


def test_torchrun_is_read_before_slurm() -> None:
    assert env.world({**STEP, **TORCHRUN}) == env.World(3, 4, 1, 2, "torchrun")


def test_a_slurm_step_counts_its_own_tasks() -> None:
    assert env.world({**STEP, "SLURM_NTASKS": "9"}) == env.World(2, 3, 0, 1, "slurm")
    assert env.world({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1,2(x3)"}).local_size == 2


def test_the_batch_shell_is_no_rank() -> None:
    shell = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert env.world(shell).size == 1


@pytest.mark.parametrize(
    ("full", "gone"), [(TORCHRUN, "WORLD_SIZE"), (TORCHRUN, "MASTER_PORT"), (STEP, "SLURM_PROCID")]
)
def test_a_half_set_environment_names_what_is_missing(full: dict[str, str], gone: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"{gone} missing"):
        env.world({name: value for name, value in full.items() if name != gone})


def test_restarts_are_counted_by_slurm() -> None:
    assert env.restarts({}) == 0
    assert env.restarts({"SLURM_RESTART_COUNT": "2"}) == 2
