"""A chain gets into Slurm's queue once and whole: the launcher killed, two launchers, slurmctld down or killed."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.chains import SMALL, jobs, launch_small, sbatch
from tests.checkout import STAGES, Checkout
from tests.cluster import Cluster
from tests.cluster.machine import PATH

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("nothing_stays_queued")]
LAUNCH = [sys.executable, "jobs/launch.py", "--file", "tests/standin/chain.yaml", "--chain"]
LAUNCH += [f"--sbatch={option}" for option in SMALL]


def wrap(here: Checkout, program: str, then: str) -> None:
    """Have `program` of Slurm be followed by shell commands; $count says which call it was, tests not counted."""
    folder = here.root / "bin"
    folder.mkdir(exist_ok=True)
    real = shutil.which(program, path=PATH)
    skip = f'case " $* " in *" --test-only "*) exec {real} "$@";; esac'
    lines = [
        "#!/bin/bash",
        skip,
        f'{real} "$@"; code=$?',
        f'echo >>"{folder}/{program}.calls"; count=$(wc -l <"{folder}/{program}.calls")',
        then,
        "exit $code",
    ]
    (folder / program).write_text("\n".join(lines) + "\n")
    (folder / program).chmod(0o755)


def wrapped(here: Checkout) -> dict[str, str]:
    return {"PATH": f"{here.root}/bin:{here.environ['PATH']}"}


def queue(here: Checkout, cluster: Cluster) -> dict[str, tuple[str, str, str]]:
    """Stage -> id and state of its one job, and the ids it waits for."""
    found: dict[str, tuple[str, str, str]] = {}
    for line in cluster.run("squeue", "-h", "-o", "%A|%T|%E|%k|%Z").stdout.splitlines():
        job, state, dependency, comment, folder = line.split("|")
        if folder != str(here.root):
            continue
        stage = comment.split(":")[2]
        assert stage not in found, f"two jobs of {stage}"
        found[stage] = (job, state, " ".join(re.findall(r"afterok:(\d+)", dependency)))
    return found


def check_chain(here: Checkout, cluster: Cluster) -> None:
    """Every stage has one job, after that of the stage before, and the launcher knows its id and log."""
    found = queue(here, cluster)
    assert sorted(found) == sorted(STAGES)
    assert {stage: job for stage, (job, _, _) in found.items()} == jobs(here)
    for before, stage in pairwise(STAGES):
        assert found[stage][1:] == ("PENDING", found[before][0])


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5])
def test_a_launcher_killed_after_any_submission_is_run_again(tmp_path: Path, cluster: Cluster, calls: int) -> None:
    here = Checkout(tmp_path, cluster)
    wrap(here, "sbatch", f"((count == {calls})) && kill -9 $PPID")
    assert here.run(*LAUNCH, "pretrain.wait_for=go", **wrapped(here)).returncode == -9
    before = queue(here, cluster)
    assert list(before) and len(before) == calls
    assert {state for _, state, _ in before.values()} == {"PENDING"}
    assert not list((here.root / "runs/standin").glob("*/state.json"))
    printed = launch_small(here, "--chain", "pretrain.wait_for=go")
    assert (printed.count("(kept)"), "unknown" in printed) == (calls, False)
    check_chain(here, cluster)
    assert {stage: job for stage, (job, _, _) in before.items()}.items() <= jobs(here).items()
    if calls == 3:
        (here.root / "go").touch()
        assert [cluster.wait(job) for job in jobs(here).values()] == ["COMPLETED"] * 5
        markers = [here.state(stage) for stage in STAGES]
        assert [marker["job_id"] for marker in markers] == list(jobs(here).values())
        assert all(one["ended"] <= two["started"] for one, two in pairwise(markers))


def test_a_launcher_killed_around_the_release_is_run_again(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    wrap(here, "squeue", "((count == 8)) && kill -9 $PPID")  # all submitted and looked up, nothing released
    assert here.run(*LAUNCH, "pretrain.wait_for=go", **wrapped(here)).returncode == -9
    assert {state for _, state, _ in queue(here, cluster).values()} == {"PENDING"}
    assert launch_small(here, "--chain", "pretrain.wait_for=go").count("(kept)") == 5
    check_chain(here, cluster)
    (here.root / "go").touch()
    assert cluster.wait(jobs(here)["eval"]) == "COMPLETED"


@pytest.mark.parametrize("shared_lock", [True, False], ids=["one node", "two nodes"])
def test_two_launchers_at_once_make_one_chain(tmp_path: Path, cluster: Cluster, shared_lock: bool) -> None:
    here = Checkout(tmp_path, cluster)
    words = [*LAUNCH, "pretrain.wait_for=go"]
    with here.start(*words) as first:
        lock = here.root / "runs/standin/.lock"
        while not lock.exists() or "process" not in lock.read_text():
            assert first.poll() is None
        first.send_signal(signal.SIGSTOP)
        if not shared_lock:  # a lock that the other does not see
            lock.unlink()
            first.send_signal(signal.SIGCONT)
        with here.start(*words) as second:
            assert second.stdout
            said = [second.stdout.readline(), second.stdout.readline()]
            first.send_signal(signal.SIGCONT)
            said.append(second.communicate(timeout=60)[0])
        output, _ = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), output + "".join(said)
    if shared_lock:
        assert f"at work on standin: process {first.pid} on " in said[1]
        assert said[2].count("(kept)") == 5
    check_chain(here, cluster)


def test_a_job_that_only_looks_like_ours_is_left_alone(tmp_path: Path, cluster: Cluster) -> None:
    here, other = Checkout(tmp_path / "here", cluster), Checkout(tmp_path / "other", cluster)
    theirs = sbatch(other, cluster, "--hold", "--comment=relay:standin:r1:00ff", "--wrap=true")
    launch_small(here, "--chain", "pretrain.wait_for=go")
    cluster.run("scancel", *jobs(here).values())
    assert theirs not in jobs(here).values()
    assert cluster.run("squeue", "-h", "-j", theirs, "-o", "%T %r").stdout == "PENDING JobHeldUser\n"


def restart(cluster: Cluster) -> None:
    """Start slurmctld again after it was killed; back when it has found its nodes."""
    cluster.children["slurmctld"].wait(timeout=60)
    cluster.launch("slurmctld")
    end = time.monotonic() + 120
    while not re.fullmatch(r"((idle|mixed)\n){2}", cluster.run("sinfo", "-hN", "-o", "%T").stdout):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_controller_that_is_down_ends_the_launch_which_goes_on_later(
    tmp_path: Path, fragile_cluster: Cluster
) -> None:
    here, cluster = Checkout(tmp_path, fragile_cluster), fragile_cluster
    wrap(here, "sbatch", f"((count == 2)) && kill -9 {cluster.children['slurmctld'].pid}")
    begun = time.monotonic()
    ended = here.run(*LAUNCH, "pretrain.wait_for=go", **wrapped(here))
    print(f"the launch ended after {time.monotonic() - begun:.0f} s")
    restart(cluster)
    assert ended.returncode == 75
    assert ended.stdout.count("; trying again in ") == 4
    named = r"in the queue: pretrain \(job \d+\), r1 \(job \d+\); the same command again adds the rest"
    assert re.search(rf"ERROR 75: .*[Uu]nable to contact slurm controller.*{named}", ended.stdout), ended.stdout
    assert {state for _, state, _ in queue(here, cluster).values()} <= {"PENDING"}
    launch_small(here, "--chain", "pretrain.wait_for=go")
    check_chain(here, cluster)


@pytest.mark.parametrize("calls", [3, 5])
def test_a_controller_that_crashes_while_jobs_are_queued(tmp_path: Path, fragile_cluster: Cluster, calls: int) -> None:
    """It may forget jobs it took a moment ago and give their ids to others."""
    here, cluster = Checkout(tmp_path, fragile_cluster), fragile_cluster
    wrap(here, "sbatch", f"((count == {calls})) && kill -9 {cluster.children['slurmctld'].pid}")
    restarting = threading.Thread(target=restart, args=(cluster,))
    restarting.start()
    done = here.run(*LAUNCH, "pretrain.wait_for=go", **wrapped(here))
    restarting.join()
    assert done.returncode == 0, done.stdout
    print(f"{len((here.root / 'bin/sbatch.calls').read_text())} submissions until all 5 were there")
    check_chain(here, cluster)
    (here.root / "go").touch()
    assert [cluster.wait(job) for job in jobs(here).values()] == ["COMPLETED"] * 5
    assert here.made("eval") == "pretrain:0.015 r1:0.03 r2:0.003 r3:0.0003 eval:0.03"


def test_a_chain_that_does_not_fit_into_the_queue_is_refused(tmp_path: Path, fragile_cluster: Cluster) -> None:
    here, cluster = Checkout(tmp_path, fragile_cluster), fragile_cluster
    conf = cluster.directory / "slurm.conf"
    text = conf.read_text()
    cluster.kill("slurmctld")
    try:
        conf.write_text(f"{text}MaxJobCount=4\n")
        cluster.launch("slurmctld")
        refused = here.run(*LAUNCH)
    finally:
        conf.write_text(text)
        cluster.kill("slurmctld")
        cluster.launch("slurmctld")
    assert refused.returncode == 2
    assert re.search(r"Slurm takes 4 jobs in all \(MaxJobCount\) and has \d+; 5 do not fit", refused.stdout)
    assert not (here.root / "runs/standin/jobs.json").exists()
