"""Who may write to a run directory, between real processes."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from utils import run_lock
from utils.errors import EnvironmentProblem, InputError
from utils.paths import ROOT, RunDir

ATTEMPT = """
import os, sys
from pathlib import Path
from utils import run_lock
from utils.errors import cli
from utils.paths import RunDir

def main():
    run_dir = RunDir(Path(sys.argv[1]))
    with run_lock.owned(run_dir):
        if sys.argv[2:] and not os.fork():  # like a loader's worker
            print("owned", flush=True)
            os.read(int(sys.argv[2]), 1)
            os._exit(0)
        if not sys.argv[2:]:
            print("owned", flush=True)
        for _ in sys.stdin:
            run_lock.check(run_dir)
            print("still owned", flush=True)

cli(main)
"""


ELSEWHERE = {"host": "n7", "pid": 4711, "job_id": "4711", "slurm": False, "step": "0", "restarts": 0, "token": "x"}


class Attempt:
    """A process that claims a run directory, then checks its claim for every line it is sent."""

    def __init__(self, run_dir: RunDir, *worker_reads: int, **environ: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ATTEMPT, run_dir.path, *map(str, worker_reads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=inherited | environ,
            pass_fds=worker_reads,
        )
        assert self.process.stdout
        self.said = self.process.stdout.readline().strip()

    def check(self) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> int:
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "chain" / "r1")


def claims(run_dir: RunDir) -> list[str]:
    return sorted(path.name for path in run_dir.path.glob(".claim*"))


def claim_elsewhere(run_dir: RunDir, **values: Any) -> Path:
    """A claim as an attempt on another node leaves it."""
    run_dir.path.mkdir(parents=True, mode=0o700)
    run_dir.claim(1).write_text(json.dumps(ELSEWHERE | values))
    return run_dir.claim(1)


def test_the_second_is_refused_until_the_first_is_killed(run_dir: RunDir) -> None:
    first = Attempt(run_dir)
    assert (first.said, first.check()) == ("owned", "still owned")
    second = Attempt(run_dir)
    where = f"{socket.gethostname()} (pid {first.process.pid})"
    assert second.said == f"ERROR 2: {run_dir.path}: running already: {where}"
    assert second.end() == 2
    first.process.kill()
    first.end()
    assert claims(run_dir) == [".claim_1.json"]
    half = run_dir.checkpoints / ".checkpoint_0001.pth.0123.tmp"
    half.parent.mkdir()
    half.touch()
    third = Attempt(run_dir)
    assert (third.said, third.check(), claims(run_dir)) == ("owned", "still owned", [".claim_2.json"])
    assert not half.exists()
    assert (third.end(), claims(run_dir)) == (0, [])


def test_a_stopped_attempt_is_refused_when_it_goes_on(run_dir: RunDir) -> None:
    old = Attempt(run_dir, SLURM_JOB_ID="77")
    old.process.send_signal(signal.SIGSTOP)
    new = Attempt(run_dir, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
    assert new.said == "owned"
    old.process.send_signal(signal.SIGCONT)
    by = f"job 77, restart 1, on {socket.gethostname()} (pid {new.process.pid})"
    assert old.check().startswith(f"ERROR 75: {run_dir.path}: this run was taken over by {by}; this attempt stops")
    assert (old.end(), new.check()) == (75, "still owned")
    late = Attempt(run_dir, SLURM_JOB_ID="77")
    assert late.said == f"ERROR 75: {run_dir.path}: running already: {by}; Slurm has requeued this job since"
    late.end()
    other = Attempt(run_dir, SLURM_JOB_ID="78", SLURM_RESTART_COUNT="2")
    assert (other.said, other.end()) == (f"ERROR 2: {run_dir.path}: running already: {by}", 2)
    assert (new.check(), new.end(), claims(run_dir)) == ("still owned", 0, [])


def test_an_attempt_that_was_replaced_releases_nothing(run_dir: RunDir) -> None:
    old = Attempt(run_dir, SLURM_JOB_ID="77")
    assert Attempt(run_dir, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1").end() == 0
    other = Attempt(run_dir, SLURM_JOB_ID="78")
    assert (claims(run_dir), old.end()) == ([".claim_1.json"], 0)  # the number is the old one's
    assert (other.check(), other.end()) == ("still owned", 0)


def test_a_claim_made_after_a_slow_look_gives_way(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_late(source: str, target: Path) -> None:
        """After an earlier claim 1 was taken over by a claim 2, and both came after this process had looked."""
        run_dir.claim(2).write_text(json.dumps(ELSEWHERE))
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    with pytest.raises(InputError, match="running already: n7"), run_lock.owned(run_dir):
        pass
    assert claims(run_dir) == [".claim_2.json"]


def test_a_worker_that_outlives_a_killed_attempt_keeps_nobody_out(run_dir: RunDir) -> None:
    for_worker, ours = os.pipe()
    try:
        first = Attempt(run_dir, for_worker)
        assert first.said == "owned"
        first.process.kill()
        first.process.wait()
        second = Attempt(run_dir)
        assert (second.said, second.end()) == ("owned", 0)
    finally:
        os.close(ours)
        os.close(for_worker)
    first.end()


def race(run_dir: RunDir, rounds: int, barrier: multiprocessing.synchronize.Barrier, winners: Any) -> None:
    os.environ |= {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}
    for number in range(rounds):
        here = RunDir(run_dir.path / str(number))
        barrier.wait(60)
        try:
            with run_lock.owned(here):
                run_lock.check(here)
                with winners.get_lock():
                    winners[number] += 1
                barrier.wait(60)
        except InputError:
            barrier.wait(60)


@pytest.mark.parametrize("before", ["nothing", "an earlier attempt"])
def test_of_several_at_once_one_wins(before: str, run_dir: RunDir) -> None:
    context, racers, rounds = multiprocessing.get_context("fork"), 4, 100
    for number in range(rounds if before != "nothing" else 0):
        claim_elsewhere(RunDir(run_dir.path / str(number)), slurm=True, job_id="77")
    barrier = context.Barrier(racers)
    winners: Any = context.Array("i", rounds)
    processes = [context.Process(target=race, args=(run_dir, rounds, barrier, winners)) for _ in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * racers
    assert winners[:] == [1] * rounds
    assert not list(run_dir.path.glob("*/.claim*"))


def test_a_claim_is_nested_within_a_process_and_lost_with_its_directory(run_dir: RunDir) -> None:
    run_lock.check(run_dir)  # no claim, nothing to lose
    with run_lock.owned(run_dir):
        with run_lock.owned(RunDir(run_dir.path.parent / "." / "r1")):
            pass
        run_lock.check(run_dir)
        assert Attempt(run_dir).end() == 2
        run_dir.path.rename(run_dir.path.with_name("r1.1"))
        with pytest.raises(EnvironmentProblem, match="was taken over; this attempt stops"):
            run_lock.check(run_dir)
    run_lock.check(run_dir)


def test_without_slurm_another_host_is_believed_to_run(run_dir: RunDir) -> None:
    file = claim_elsewhere(run_dir)
    says = f"running already: n7 .pid 4711.; if that process has ended, remove {file}"
    with pytest.raises(InputError, match=says), run_lock.owned(run_dir):
        pass
    file.unlink()
    with run_lock.owned(run_dir):
        run_lock.check(run_dir)


@pytest.mark.slurm
def test_slurm_is_asked_about_another_host(cluster: Cluster, run_dir: RunDir, tmp_path: Path) -> None:
    job = cluster.sbatch("-o", "/dev/null", "--wrap", "sleep 600")
    file = claim_elsewhere(run_dir, slurm=True, job_id=job)
    attempt = Attempt(run_dir, **cluster.env)
    assert attempt.said == f"ERROR 2: {run_dir.path}: running already: job {job} on n7 (pid 4711)"
    assert attempt.end() == 2
    blind = Attempt(run_dir, **cluster.env | {"PATH": str(tmp_path)})
    assert blind.said.endswith(f"squeue: no such program; if that process has ended, remove {file}")
    assert blind.end() == 75
    cluster.run("scancel", job)
    cluster.wait(job)
    assert Attempt(run_dir, **cluster.env).end() == 0
    unknown = RunDir(tmp_path / "chain" / "r2")
    claim_elsewhere(unknown, slurm=True, job_id="999999")
    assert Attempt(unknown, **cluster.env).end() == 0


def test_a_damaged_claim_is_named(run_dir: RunDir) -> None:
    file = claim_elsewhere(run_dir)
    file.write_text("")
    with pytest.raises(InputError, match=f"{file} is damaged"), run_lock.owned(run_dir):
        pass
