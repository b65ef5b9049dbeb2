"""Chains of stand-in stages on a real Slurm: by the launcher, by plain sbatch, and when something fails."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from jobs import submit
from tests.chains import SMALL, STANDIN, described, jobs, launch_small, sbatch, states, wait_until_running
from tests.checkout import STAGES, Checkout
from tests.cluster import Cluster
from utils import files

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("nothing_stays_queued")]


def test_the_launcher_asks_for_what_the_scripts_ask_for(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    assert here.launch("--chain", "--sbatch=--hold").returncode == 0
    scripts = sorted(here.root.glob("slurm/*mocov2*.slurm"), key=lambda path: "pret demo eval".find(path.name[:4]))
    for script, job in zip(scripts, jobs(here).values(), strict=True):
        plain = sbatch(here, cluster, "--hold", f"slurm/{script.name}")
        ours, theirs = described(cluster, job), described(cluster, plain)
        cluster.run("scancel", plain)
        submission = (here.root / f"runs/standin/submitted/{job}_submission.sh").read_text()
        for option in ("signal", "kill-on-invalid-dep"):  # which Slurm does not show
            line = f"#SBATCH --{option}={submit.header(script)[option]}\n"
            assert line in script.read_text() and line in submission
        for field in (
            "NumNodes",
            "NumCPUs",
            "NumTasks",
            "MinMemoryNode",
            "TimeLimit",
            "TresPerNode",
            "Requeue",
        ):
            assert ours[field] == theirs[field], (script.name, field)


def test_a_chain_by_the_launcher_is_submitted_once_and_ends_with_a_report(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--chain", "pretrain.wait_for=go")
    first = jobs(here)
    assert list(first) == STAGES
    wait_until_running(here, "pretrain")
    assert launch_small(here, "--chain", "pretrain.wait_for=go").count("(kept)") == 5
    assert jobs(here) == first
    assert states(here) == ["RUNNING", "PENDING", "PENDING", "PENDING", "PENDING"]
    (here.root / "go").touch()
    assert [cluster.wait(job) for job in first.values()] == ["COMPLETED"] * 5
    assert here.made("eval") == "pretrain:0.015 r1:0.03 r2:0.003 r3:0.0003 eval:0.03"
    assert states(here) == ["DONE"] * 5
    assert re.search(r"DONE +\d+ +n[12] +2 +7 +0.2500  0.5000 ", here.table()["eval"])
    assert launch_small(here, "--chain", "pretrain.wait_for=go").count("done") == 5
    assert jobs(here) == first


def check_failed_r1(here: Checkout, cluster: Cluster) -> None:
    """r1 fails: what --status says then, and that the next launch starts at r1."""
    launch_small(here, "--chain", "r1.fail=error")
    old = jobs(here)
    assert [cluster.wait(job, timeout=60) for job in old.values()] == ["COMPLETED", "FAILED"] + ["CANCELLED"] * 3
    table = here.table()
    assert states(here) == ["DONE", "FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    cause, log = re.split(r" {2,}", table["r1"])[-2:]
    assert cause == "RuntimeError: the disk is on fire"
    assert "the disk\nis on fire" in (here.root / log).read_text()
    assert table["r2"].endswith("r1 is FAILED")
    launch_small(here, "--only", "r1", "--sbatch=--hold")
    assert here.launch("--cancel").returncode == 0
    assert states(here)[1] == "CANCELLED"  # of the newest job, not of the one that failed
    launch_small(here, "--chain")
    new = jobs(here)
    assert [stage for stage in STAGES if new[stage] == old[stage]] == ["pretrain"]
    assert cluster.wait(new["eval"]) == "COMPLETED"


def test_a_failed_r1_is_shown_and_the_next_launch_starts_there(tmp_path: Path, cluster: Cluster) -> None:
    check_failed_r1(Checkout(tmp_path, cluster), cluster)


def test_status_without_accounting(tmp_path: Path, cluster_without_accounting: Cluster) -> None:
    cluster = cluster_without_accounting
    here = Checkout(tmp_path, cluster)
    check_failed_r1(here, cluster)
    launch_small(here, "--only", "pretrain", "fail=kill")
    job = jobs(here)["pretrain"]
    assert cluster.wait(job) == "FAILED"
    assert re.search(rf"^pretrain +FAILED +{job} .*rank 0 was killed by signal 9, SIGKILL", here.table()["pretrain"])
    marker = {**here.state("pretrain"), "status": "running", "ended": None, "cause": None}
    files.write_json(here.root / "runs/standin/pretrain/state.json", marker)  # as when the batch shell is killed too
    assert re.search(rf"^pretrain +FAILED +{job} .*Slurm: FAILED", here.table()["pretrain"])
    text = (here.root / "runs/standin/jobs.json").read_text()
    (here.root / "runs/standin/jobs.json").write_text(text.replace(f'"{job}"', '"999999"'))
    files.write_json(here.root / "runs/standin/pretrain/state.json", marker | {"job_id": "999999"})
    assert re.search(r"^pretrain +FAILED \(gone\) +999999 .*job 999999 is gone", here.table()["pretrain"])


def test_a_link_does_not_start_after_a_failed_parent_that_slurm_has_forgotten(
    tmp_path: Path, forgetful_cluster: Cluster
) -> None:
    cluster = forgetful_cluster
    here = Checkout(tmp_path, cluster)
    assert here.worker("pretrain").returncode == 0
    r1 = sbatch(here, cluster, *SMALL, "slurm/demo_mocov2_fpn_r1.slurm", *STANDIN, "fail=error")
    assert cluster.wait(r1) == "FAILED"
    end = time.monotonic() + 120
    while cluster.run("scontrol", "show", "job", r1).returncode == 0:
        assert time.monotonic() < end
        time.sleep(0.5)
    r2 = sbatch(here, cluster, *SMALL, f"--dependency=afterok:{r1}", "slurm/demo_mocov2_fpn_r2.slurm", *STANDIN)
    assert cluster.wait(r2) == "FAILED"
    assert described(cluster, r2)["ExitCode"] == "2:0"
    output = (here.root / f"runs/demo_mocov2_fpn_r2_{r2}.out").read_text()
    assert "ERROR 2: parent r1 is failed: RuntimeError: the disk is on fire" in output
    assert states(here) == ["DONE", "FAILED", "FAILED", "TODO", "TODO"]


def test_scripts_one_by_one_pass_their_words_on(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    for script in ("pretrain_mocov2", "demo_mocov2_fpn_r1"):
        job = sbatch(here, cluster, *SMALL, f"slurm/{script}.slurm", *STANDIN, "--name", "mine")
        assert cluster.wait(job) == "COMPLETED"
    words = [*STANDIN, "--lr", "0.001", "--name", "mine", "epochs=9"]
    job = sbatch(here, cluster, *SMALL, "slurm/demo_mocov2_fpn_r2.slurm", *words)
    assert cluster.wait(job) == "COMPLETED"
    marker = here.state("r2", "mine")
    assert (marker["config"]["optim.lr"], marker["epochs"], marker["job_id"]) == (0.001, 9, job)
    assert here.made("r2", "mine") == "pretrain:0.015 r1:0.03 r2:0.001"
    assert "made pretrain:0.015" in (here.root / f"runs/demo_mocov2_fpn_r2_{job}.out").read_text()


def test_the_chain_script_queues_all_stages_from_a_shell_and_from_a_job(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    queued = here.run("bash", "slurm/chain.slurm", *STANDIN, SLURM_JOB_ID="1", SLURM_SUBMIT_DIR="/")  # as by salloc
    ids = re.findall(r": job (\d+)$", queued.stdout, re.MULTILINE)
    assert len(ids) == 5, queued.stdout
    assert f"afterok:{ids[3]}" in described(cluster, ids[4])["Dependency"]
    job = sbatch(here, cluster, "slurm/chain.slurm", *STANDIN, "--name", "second")
    assert cluster.wait(ids[4]) == "COMPLETED"
    assert here.made("eval") == "pretrain:0.015 r1:0.03 r2:0.003 r3:0.0003 eval:0.03"
    assert cluster.wait(job) == "COMPLETED"
    last = (here.root / f"runs/chain_{job}.out").read_text().split()[-1]
    assert cluster.wait(last) == "COMPLETED"
    assert here.made("eval", "second") == here.made("eval")


def test_the_launcher_works_inside_a_job(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    options = " ".join(f"--sbatch={option}" for option in SMALL)
    command = f'"$RELAY_PYTHON" jobs/launch.py {" ".join(STANDIN)} {options} --only pretrain'
    job = sbatch(here, cluster, "--mem-per-cpu=300M", "--output=out", f"--wrap={command}")
    assert cluster.wait(job) == "COMPLETED", (here.root / "out").read_text()
    assert cluster.wait(jobs(here)["pretrain"]) == "COMPLETED"
    assert here.state("pretrain")["job_id"] == jobs(here)["pretrain"]


def test_a_job_runs_in_the_environment_that_site_sh_says(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    with open(here.root / "slurm/site.sh", "a") as site:
        site.write('site_setup() { export STANDIN_PLACE="$NOT_SET cluster"; }\n')  # as modules do
        site.write('export RELAY_CONTAINER="env STANDIN_BOX=container"\n')
    launch_small(here, "--sbatch=--cpus-per-task=3", "--only", "pretrain")
    job = sbatch(here, cluster, *SMALL, "-c3", "slurm/pretrain_mocov2.slurm", *STANDIN, "--name", "second")
    for job_id, chain in ((jobs(here)["pretrain"], "standin"), (job, "second")):
        assert cluster.wait(job_id) == "COMPLETED"
        seen = "{'OMP_NUM_THREADS': '3', 'STANDIN_PLACE': ' cluster', 'STANDIN_BOX': 'container'}"
        assert seen in Path(here.state("pretrain", chain)["log"]).read_text()


def test_two_nodes_meet(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    job = sbatch(here, cluster, *SMALL, "--nodes=2", "slurm/pretrain_mocov2.slurm", *STANDIN, "ranks=meet")
    assert cluster.wait(job) == "COMPLETED", (here.root / f"runs/pretrain_mocov2_{job}.out").read_text()
    run_dir = here.root / "runs/standin/pretrain"
    assert json.loads((run_dir / "ranks.json").read_text()) == {"size": 2, "mean": 0.5}
    assert "rank 1 of 2" in (run_dir / f"logs/{job}_0_rank1.log").read_text()
    assert described(cluster, job)["NumNodes"] == "2"


def test_cancel_ends_what_is_queued_and_running(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--chain", "pretrain.wait_for=never")
    wait_until_running(here, "pretrain")
    refused = here.launch("--chain", "--cluster", "local")
    assert (refused.returncode, "queued or running: pretrain (job" in refused.stdout) == (2, True)
    assert here.launch("--cancel").returncode == 0
    assert [cluster.wait(job) for job in jobs(here).values()] == ["CANCELLED"] * 5
    assert states(here) == ["CANCELLED"] * 5


def test_a_live_job_is_kept_only_with_its_own_configuration(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--chain", "--sbatch=--hold")
    first = jobs(here)
    refused = here.launch("--chain", "r2.optim.lr=0.5")
    assert refused.returncode == 2
    text = f"r2 is queued (job {first['r2']}) with another configuration: optim.lr 0.003 -> 0.5; --cancel first"
    assert text in refused.stdout
    assert [f"# {stage}: kept, job {job}\n" in launch_small(here, "--chain", "--dry-run")
            for stage, job in first.items()] == [True] * 5  # fmt: skip
    assert launch_small(here, "--chain", "workers=2").count("(kept)") == 5
    cluster.run("scancel", first["r1"])
    assert f"afterok:{first['pretrain']}" in launch_small(here, "--chain", "--dry-run", "r2.optim.lr=0.5")
    launch_small(here, "--chain", "--sbatch=--hold", "r2.optim.lr=0.5")  # r2 waited for the one that is gone
    assert [stage for stage in STAGES if jobs(here)[stage] == first[stage]] == ["pretrain"]


def test_jobs_that_nobody_wrote_down_are_found_in_their_own_checkout(tmp_path: Path, cluster: Cluster) -> None:
    here, other = Checkout(tmp_path / "here", cluster), Checkout(tmp_path / "other", cluster)
    launch_small(here, "--only", "pretrain", "--sbatch=--hold")
    lost = jobs(here)["pretrain"]
    (here.root / "runs/standin/jobs.json").unlink()
    assert f"{lost} (kept, its configuration is unknown)" in launch_small(here, "--only", "pretrain")
    assert "cancelled: nothing" in other.launch("--cancel").stdout
    assert f"cancelled: pretrain (job {lost})\n" in here.launch("--cancel").stdout
    plain = sbatch(here, cluster, *SMALL, "slurm/pretrain_mocov2.slurm", *STANDIN, "wait_for=never")
    wait_until_running(here, "pretrain")
    assert here.launch("--cancel").stdout == f"cancelled: pretrain (job {plain})\n"
    queued = here.run("bash", "slurm/chain.slurm", *STANDIN, "--name", "mine", "wait_for=never")
    ids = re.findall(r": job (\d+)$", queued.stdout, re.MULTILINE)
    table = here.table("--name", "mine")
    assert [table[stage].split()[1] for stage in STAGES[1:]] == ["PENDING"] * 4
    assert [job in table[stage] for stage, job in zip(STAGES, ids, strict=True)] == [True] * 5
    listed = ", ".join(f"{stage} (job {job})" for stage, job in zip(STAGES, ids, strict=True))
    assert here.launch("--cancel", "--name", "mine").stdout == f"cancelled: {listed}\n"
    assert [cluster.wait(job) for job in ids] == ["CANCELLED"] * 5


def test_a_launch_needs_no_accounting_and_a_squeue_that_answers(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--only", "pretrain", "--sbatch=--hold")
    text = (here.root / "runs/standin/jobs.json").read_text()
    cluster.run("scancel", jobs(here)["pretrain"])
    (here.root / "runs/standin/jobs.json").write_text(text.replace(jobs(here)["pretrain"], "999999"))
    (here.root / "bin").mkdir()
    here.environ["PATH"] = f"{here.root}/bin:{here.environ['PATH']}"
    for program in ("sacct", "squeue"):
        (here.root / "bin" / program).write_text(f"#!/bin/sh\necho {program} is down >&2\nexit 1\n")
        (here.root / "bin" / program).chmod(0o755)
        assert f"{program} is down" in here.launch("--status").stdout
        launched = here.launch("--only", "pretrain", "--sbatch=--hold")
        assert launched.returncode == {"sacct": 0, "squeue": 75}[program], launched.stdout


def test_a_requeued_job_goes_on_as_the_same_job(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    launch_small(here, "--only", "pretrain", "wait_for=go")
    job = wait_until_running(here, "pretrain")["job_id"]
    cluster.run("scancel", "--signal=USR2", job)
    wait_until_running(here, "pretrain", restarts=1)
    (here.root / "go").touch()
    assert cluster.wait(job) == "COMPLETED"
    marker = here.state("pretrain")
    assert (marker["status"], marker["job_id"], marker["restarts"]) == ("done", job, 1)


def test_what_sbatch_refuses_is_told_before_anything_is_queued(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    with open(here.root / "slurm/site.sh", "a") as site:
        site.write("export SBATCH_PARTITION=nowhere\n")
    refused = here.launch("--chain")
    assert refused.returncode == 2
    assert "pretrain, r1, r2, r3, eval: sbatch: error: invalid partition specified: nowhere" in refused.stdout
    assert here.files() == set()
    assert here.launch("--chain", "--sbatch=--partition=main", "--dry-run").returncode == 0
    assert here.files() == set()
