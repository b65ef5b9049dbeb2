"""The throw-away Slurm: what it is used for works, and nothing of it is left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.cluster import machine as cluster_machine
from utils.errors import EnvironmentProblem, InputError

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slurm


def until(probe: str, answer: str, cluster: Cluster, timeout: float = 120) -> str:
    """What the command `probe` printed once `answer` matched it."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done = cluster.run(*probe.split())
        if found := re.search(answer, done.stdout + done.stderr):
            return found[0]
        time.sleep(0.2)
    raise TimeoutError(f"{probe}: {done.stdout}{done.stderr}")


def left_behind(directory: Path) -> list[str]:
    """Command lines that name `directory`, found another way than Cluster.stop finds its processes."""
    commands = {path: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()}
    return [line.decode() for line in commands.values() if str(directory).encode() in line]


def test_a_job_runs_to_completed(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("-o", "%j.out", "--wrap", "echo from $SLURM_JOB_ID", cwd=tmp_path)
    assert cluster.wait(job) == "COMPLETED"
    assert (tmp_path / f"{job}.out").read_text() == f"from {job}\n"
    assert until(f"sacct -nPX -j {job} -o JobID,State,ExitCode", r"COMPLETED.*", cluster) == "COMPLETED|0:0"


def test_a_task_on_each_node(cluster: Cluster) -> None:
    done = cluster.run("srun", "-N2", "-n2", "printenv", "SLURMD_NODENAME")
    assert sorted(done.stdout.split()) == ["n1", "n2"], done.stderr


def test_gpus_are_handed_out(cluster: Cluster) -> None:
    both = cluster.run("srun", "-n1", "--gpus=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert both.stdout == "0,1\n", both.stderr
    one_each = cluster.run("srun", "-N1", "-n2", "--gpus-per-task=1", "printenv", "CUDA_VISIBLE_DEVICES")
    assert sorted(one_each.stdout.split()) == ["0", "1"], one_each.stderr
    assert "not available" in cluster.run("srun", "-N1", "--gpus=5", "true").stderr


def test_jobs_share_a_node(cluster: Cluster, tmp_path: Path) -> None:
    meet = f"mkfifo {tmp_path}/a 2>/dev/null; "
    reader = cluster.sbatch("-w", "n1", "-o", "/dev/null", "--wrap", meet + f"read x < {tmp_path}/a")
    writer = cluster.sbatch("-w", "n1", "-o", "/dev/null", "--wrap", meet + f"echo met > {tmp_path}/a")
    assert [cluster.wait(reader), cluster.wait(writer)] == ["COMPLETED", "COMPLETED"]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.slurm")))
def test_a_node_has_what_the_scripts_ask_for(cluster: Cluster, script: str) -> None:
    done = cluster.run("sbatch", "--test-only", f"slurm/{script}", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_link_after_a_failed_job_is_cancelled(cluster: Cluster) -> None:
    parent = cluster.sbatch("-o", "/dev/null", "--wrap", "exit 3")
    link = ("-d", f"afterok:{parent}", "--kill-on-invalid-dep=yes", "-o", "/dev/null", "--wrap", "true")
    child = cluster.sbatch(*link)
    assert cluster.wait(parent) == "FAILED"
    assert cluster.wait(child) == "CANCELLED"


def test_a_requeued_job_comes_back_soon(cluster: Cluster, tmp_path: Path) -> None:
    body = 'echo $SLURM_RESTART_COUNT; [ "$SLURM_RESTART_COUNT" ] || scontrol requeue $SLURM_JOB_ID; sleep 1'
    job = cluster.sbatch("--open-mode=append", "-o", "out", "--wrap", body, cwd=tmp_path)
    assert cluster.wait(job, timeout=60) == "COMPLETED"
    assert (tmp_path / "out").read_text().splitlines()[-1] == "1"


def test_a_forgotten_job_is_known_to_sacct_alone(forgetful_cluster: Cluster) -> None:
    job = forgetful_cluster.sbatch("-o", "/dev/null", "--wrap", "exit 3")
    assert forgetful_cluster.wait(job) == "FAILED"
    until(f"scontrol show job {job}", "Invalid job id", forgetful_cluster)
    assert forgetful_cluster.wait(job) == "FAILED"
    # Slurm takes the dependency on a forgotten job for kept, though that job failed
    child = forgetful_cluster.sbatch("-d", f"afterok:{job}", "-o", "/dev/null", "--wrap", "true")
    assert forgetful_cluster.wait(child) == "COMPLETED"


def test_without_accounting(cluster_without_accounting: Cluster) -> None:
    job = cluster_without_accounting.sbatch("-o", "/dev/null", "--wrap", "true")
    assert cluster_without_accounting.wait(job) == "COMPLETED"
    sacct = cluster_without_accounting.run("sacct", "-j", job)
    assert sacct.returncode != 0
    assert "accounting storage is disabled" in sacct.stderr


def test_a_killed_daemon_can_be_launched_again(cluster_without_accounting: Cluster) -> None:
    cluster_without_accounting.kill("slurmctld")
    assert "is UP" not in cluster_without_accounting.run("scontrol", "ping").stdout
    cluster_without_accounting.launch("slurmctld")
    until("sinfo -hN -o %T", r"\Aidle\nidle\n\Z", cluster_without_accounting)


def test_stop_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("c")
    begun = time.monotonic()
    cluster = Cluster.start(directory)
    print(f"a cluster with accounting is up after {time.monotonic() - begun:.1f} s")
    pids = directory.parent / "pids"
    note = f">> {pids}"
    body = f"echo $$ {note}; setsid sleep 600 & echo $! {note}; srun sh -c 'echo $$ {note}; sleep 600'"
    cluster.sbatch("-N2", "-n2", "-o", "/dev/null", "--wrap", body)
    while not pids.exists() or len(pids.read_text().split()) < 4:
        time.sleep(0.1)
    assert left_behind(directory)
    cluster.stop()
    assert left_behind(directory) == []
    assert [pid for pid in pids.read_text().split() if Path(f"/proc/{pid}/exe").exists()] == []
    assert not directory.exists()
    cluster.stop()


def test_a_failed_start_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bin" / "slurmctld"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho fatal: no such luck\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("tests.cluster.PATH", f"{broken.parent}:{cluster_machine.PATH}")
    with pytest.raises(EnvironmentProblem, match=r"slurmctld does not start(.|\n)*no such luck"):
        Cluster.start(tmp_path / "c", accounting=False)
    assert left_behind(tmp_path) == []
    assert not (tmp_path / "c").exists()


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_machine, "PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=r"no munged, .*sacct: python -m tests\.cluster install"):
        Cluster.start(tmp_path / "c")


@pytest.mark.parametrize("name", ["with space", "long" * 30])
def test_a_directory_that_will_not_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="space, or more than 90"):
        Cluster.start(tmp_path / name)


def test_up_and_down_from_the_command_line(tmp_path: Path) -> None:
    directory = tmp_path / "c"

    def command(action: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "tests.cluster", action, "--dir", str(directory)]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)

    up = command("up")
    assert f"export SLURM_CONF={directory}/slurm.conf\n" in up.stdout, up.stderr
    try:
        env = os.environ | Cluster(directory).env
        nodes = subprocess.check_output(["sinfo", "-hN", "-o", "%N"], env=env, text=True, timeout=60)
        assert nodes == "n1\nn2\n"
        again = command("up")
        assert (again.returncode, "python -m tests.cluster down" in again.stderr) == (2, True)
        # the user's own shell, as `export SLURM_CONF` makes it, is not the cluster's to kill
        shell = subprocess.Popen(["sleep", "600"], env=env)
        assert command("down").returncode == 0
        assert shell.poll() is None
        shell.kill()
        shell.wait()
    finally:
        Cluster(directory).stop()
    assert left_behind(directory) == []
    assert not directory.exists()


def test_down_deletes_no_other_directory(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=somebody\n")
    argv = [sys.executable, "-m", "tests.cluster", "down", "--dir", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert (tmp_path / "slurm.conf").exists()
