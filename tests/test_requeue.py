"""Jobs that are asked to end, preempted, cancelled or killed on a real Slurm: what is requeued, and what is final."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chains import described, jobs, launch_small, states, wait_until_running
from tests.checkout import STAGES, Checkout
from tests.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("nothing_stays_queued")]
SAVED = "checkpoint_0000_0000000{}.pth"


def until(probe: Callable[[], object], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not probe():
        assert time.monotonic() < end
        time.sleep(0.1)


def wait_until_listening(here: Checkout, stage: str, restarts: int = 0, ranks: int = 1) -> str:
    """Wait until the stand-in notes signals; the job's id."""
    job = wait_until_running(here, stage, restarts)["job_id"]
    for rank in range(ranks):
        log = here.root / f"runs/standin/{stage}/logs/{job}_{restarts}_rank{rank}.log"
        until(lambda log=log: log.exists() and "listening" in log.read_text())  # type: ignore[misc]
    return str(job)


def test_a_stage_that_is_asked_to_end_goes_on_as_the_same_job_while_the_others_wait(
    tmp_path: Path, cluster: Cluster
) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--chain", "pretrain.wait_for=go", "--sbatch=--ntasks-per-node=2")
    first = jobs(here)
    signals = ["-s USR2", "--full -s USR2", "--batch -s USR1", "-s TERM"]
    for restarts, words in enumerate(map(str.split, signals)):
        job = wait_until_listening(here, "pretrain", restarts, ranks=2)
        cluster.run("scancel", *words, job)
        until(lambda: here.table()["pretrain"].split()[1] == "REQUEUED")
        name = {"USR1": "SIGUSR1", "USR2": "SIGUSR2", "TERM": "SIGTERM"}[words[-1]]
        assert f"stopped by {name} after step {restarts + 1}" in here.table()["pretrain"]
        assert states(here)[1:] == ["PENDING"] * 4
    marker = wait_until_running(here, "pretrain", restarts=4)
    assert (marker["begins"], marker["idle"]) == (SAVED.format(4), 0)
    (here.root / "go").touch()
    assert [cluster.wait(job) for job in first.values()] == ["COMPLETED"] * 5
    assert jobs(here) == first
    assert here.state("pretrain")["job_id"] == first["pretrain"]
    assert [here.state(stage)["restarts"] for stage in STAGES] == [4, 0, 0, 0, 0]


def test_a_time_limit_of_a_minute_is_no_end(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    words = ["--only", "pretrain", "wait_for=go", "--sbatch=--time=1", "--sbatch=--signal=USR2@30"]
    assert "of its 60 s the last 30 to 90 are for saving" in launch_small(here, *words)
    until(lambda: here.table()["pretrain"].split()[1] == "REQUEUED", timeout=90)
    assert wait_until_running(here, "pretrain", restarts=1)["begins"] == SAVED.format(1)
    (here.root / "go").touch()
    assert cluster.wait(jobs(here)["pretrain"]) == "COMPLETED"


def test_signals_before_python_listens_end_nothing(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    with open(here.root / "slurm/site.sh", "a") as site:
        site.write("[[ -z ${SLURM_JOB_ID:-} ]] || touch in_the_shell\n")
    launch_small(here, "--only", "pretrain", "wait_for=go")
    job = jobs(here)["pretrain"]
    until(lambda: described(cluster, job)["JobState"] == "RUNNING")
    while not list((here.root / "runs/standin").glob("pretrain/logs/*.log")):
        cluster.run("scancel", "-s", "USR2", job)
        if (here.root / "in_the_shell").exists():
            cluster.run("scancel", "--full", "-s", "USR2", job)
        cluster.run("scancel", "-s", "TERM", job)
        assert described(cluster, job)["JobState"] not in ("FAILED", "CANCELLED")
    (here.root / "go").touch()
    assert cluster.wait(job) == "COMPLETED"
    assert here.state("pretrain")["status"] == "done"


def test_a_rank_killed_by_a_signal_before_it_began_is_requeued(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    dies = "exec env --default-signal=USR2 bash -c 'kill -USR2 $$'"
    once = f"[[ -e once || -z ${{SLURM_STEP_ID:-}} ]] || {{ touch once; {dies}; }}"
    (here.root / "container").write_text(f'#!/bin/bash\n{once}\nexec "$@"\n')
    (here.root / "container").chmod(0o755)
    with open(here.root / "slurm/site.sh", "a") as site:
        site.write(f'export RELAY_CONTAINER="{here.root}/container"\n')
    launch_small(here, "--only", "pretrain")
    assert cluster.wait(jobs(here)["pretrain"]) == "COMPLETED"
    assert (here.state("pretrain")["status"], here.state("pretrain")["restarts"]) == ("done", 1)


def test_what_a_user_cancels_is_not_requeued_and_goes_on_when_launched_again(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--chain", "pretrain.wait_for=go")
    job = wait_until_listening(here, "pretrain")
    cluster.run("scancel", job)
    assert [cluster.wait(job) for job in jobs(here).values()] == ["CANCELLED"] * 5
    assert described(cluster, job)["Restarts"] == "0"
    assert here.state("pretrain")["status"] == "preempted"
    assert re.search(r"^pretrain +CANCELLED .*stopped by SIGTERM after step 1", here.table()["pretrain"])
    launch_small(here, "--only", "pretrain", "wait_for=go", "save_seconds=2")
    until(lambda: here.state("pretrain")["job_id"] == jobs(here)["pretrain"])
    assert here.state("pretrain")["begins"] == SAVED.format(1)
    second = wait_until_listening(here, "pretrain")
    cluster.run("scancel", second)
    launch_small(here, "--only", "pretrain", "wait_for=go")  # while that one is saving
    assert jobs(here)["pretrain"] not in (job, second)
    until(lambda: here.state("pretrain")["job_id"] == jobs(here)["pretrain"])
    assert here.state("pretrain")["begins"] == SAVED.format(2)


def test_a_preempted_job_is_requeued_by_slurm_and_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--only", "pretrain", "wait_for=go")
    job = wait_until_listening(here, "pretrain")
    assert cluster.run("scontrol", "create", "PartitionName=urgent", "Nodes=n1,n2", "PriorityTier=10").returncode == 0
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--mem=0", "--output=/dev/null", "--wrap=true"]
    assert cluster.wait(cluster.sbatch(*urgent)) == "COMPLETED"
    assert cluster.run("scontrol", "delete", "PartitionName=urgent").returncode == 0
    assert wait_until_running(here, "pretrain", restarts=1)["begins"] == SAVED.format(1)
    (here.root / "go").touch()
    assert cluster.wait(job) == "COMPLETED"
    assert described(cluster, job)["Restarts"] == "1"


def test_a_job_that_comes_no_further_is_ended_after_three_restarts(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--chain", "pretrain.wait_for=never", "pretrain.saves=false")
    for restarts in range(4):
        job = wait_until_listening(here, "pretrain", restarts)
        assert here.state("pretrain")["idle"] == restarts
        cluster.run("scancel", "-s", "USR2", job)
    assert [cluster.wait(job) for job in jobs(here).values()] == ["FAILED"] + ["CANCELLED"] * 4
    assert described(cluster, job)["ExitCode"] == "75:0"
    table = here.table()
    cause = "no progress in 4 restarts of job {}: it has no checkpoint to begin from, as each time; before: stopped by"
    assert cause.format(job) in table["pretrain"]
    assert states(here) == ["FAILED"] + ["CANCELLED"] * 4


@pytest.mark.parametrize(
    ("fail", "cause"),
    [
        ("kill", "rank 1 was killed by signal 9, SIGKILL (out of memory?)"),
        ("segv", "rank 1 was killed by signal 11, SIGSEGV"),
        ("error", "RuntimeError: the disk is on fire"),
    ],
)
def test_a_rank_that_dies_ends_the_chain_with_its_cause(
    tmp_path: Path, cluster: Cluster, fail: str, cause: str
) -> None:
    here = Checkout(tmp_path, cluster)
    words = [f"r1.fail={fail}", "r1.fail_on_rank=1", "r1.ranks=meet", "--sbatch=--ntasks-per-node=2"]
    launch_small(here, "--chain", *words)
    old = jobs(here)
    assert cluster.wait(old["r1"]) == "FAILED"
    assert [cluster.wait(old[stage], timeout=60) for stage in STAGES[2:]] == ["CANCELLED"] * 3
    assert states(here) == ["DONE", "FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert cause in here.table()["r1"]
    assert described(cluster, old["r1"])["Restarts"] == "0"
    launch_small(here, "--chain")
    assert [stage for stage in STAGES if jobs(here)[stage] == old[stage]] == ["pretrain"]
    assert cluster.wait(jobs(here)["eval"]) == "COMPLETED"


def test_where_a_job_may_not_be_requeued_its_work_is_kept(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--only", "pretrain", "wait_for=go")
    job = wait_until_listening(here, "pretrain")
    cluster.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    cluster.run("scancel", "-s", "USR2", job)
    assert cluster.wait(job) == "FAILED"
    assert described(cluster, job)["ExitCode"] == "75:0"
    log = here.root / f"runs/standin/submitted/{job}_0_log.out"
    assert f"ERROR 75: job {job} cannot be requeued: " in log.read_text()
    assert re.search(r"^pretrain +PREEMPTED .*stopped by SIGUSR2 after step 1", here.table()["pretrain"])
    launch_small(here, "--only", "pretrain", "wait_for=go")
    until(lambda: here.state("pretrain")["job_id"] == jobs(here)["pretrain"])
    assert here.state("pretrain")["begins"] == SAVED.format(1)
