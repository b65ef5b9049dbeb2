"""The worker: parents verified, marker kept, causes not lost, one run at a time."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from jobs import state
from tests import disks
from tests.checkout import Checkout
from utils import files
from utils.files import sha256

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def here(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_finished_stage_leaves_its_whole_marker_and_is_not_run_twice(here: Checkout) -> None:
    assert here.worker("pretrain").returncode == 0
    assert here.worker("r1", "--lr", "0.5").returncode == 0
    marker = here.state("r1")
    runs = here.root / "runs/standin"
    source = {"path": str(runs / "pretrain/backbone.txt"), "sha256": sha256(runs / "pretrain/backbone.txt")}
    assert marker["inputs"] == {"backbone": {"from": "pretrain.backbone", **source}}
    assert marker["outputs"]["last"] == {
        "path": str(runs / "r1/last.txt"),
        "sha256": sha256(runs / "r1/last.txt"),
    }
    assert (marker["chain"], marker["stage"], marker["status"]) == ("standin", "r1", "done")
    assert (marker["epochs"], marker["metrics"], marker["restarts"], marker["slurm"]) == (
        3,
        {"AP": 0.5},
        0,
        False,
    )
    assert (marker["config"]["optim.lr"], marker["cause"]) == (0.5, None)
    assert marker["started"] <= marker["ended"]
    assert "made pretrain:0.015 r1:0.5" in Path(marker["log"]).read_text()
    again = here.worker("r1", "--lr", "0.5")
    assert (again.returncode, "r1 is already done" in again.stdout) == (0, True)
    other = here.worker("r1", "--lr", "0.6")
    assert other.returncode == 2
    assert "done with another configuration: optim.lr 0.5 -> 0.6" in other.stdout
    assert here.state("r1") == marker


def test_a_parent_that_is_not_done_is_refused(here: Checkout) -> None:
    refused = here.worker("r1")
    assert refused.returncode == 2
    assert "ERROR 2: parent pretrain is not done: todo" in refused.stdout
    assert here.worker("pretrain", "fail=error").returncode == 1
    refused = here.worker("r1")
    assert refused.returncode == 2
    cause = "parent pretrain is failed: RuntimeError: the disk is on fire (log: "
    assert f"ERROR 2: {cause}" in refused.stdout
    assert here.state("r1")["cause"].startswith(cause)
    assert here.worker("pretrain").returncode == 0
    assert here.worker("r1").returncode == 0


def test_an_input_that_is_not_the_file_the_parent_left_is_refused(here: Checkout) -> None:
    here.worker("pretrain")
    (here.root / "runs/standin/pretrain/backbone.txt").write_text("another")
    refused = here.worker("r1")
    assert refused.returncode == 2
    assert "backbone.txt is not the file that pretrain left (its sha256 differs)" in refused.stdout


def test_a_stage_begun_from_what_is_gone_is_not_continued(here: Checkout) -> None:
    here.worker("pretrain")
    here.worker("r1", "fail=error")
    (here.root / "runs/standin/pretrain").rename(here.root / "runs/standin/pretrain.1")
    here.worker("pretrain", "--lr", "7")
    refused = here.worker("r1")
    assert refused.returncode == 2
    assert "r1 has begun from something its parent does not have any more" in refused.stdout


def test_inputs_given_by_hand_need_no_parent(here: Checkout) -> None:
    (here.root / "mine.txt").write_text("mine")
    assert here.worker("r1", "--bp", "mine.txt").returncode == 0
    assert here.made("r1") == "mine r1:0.03"
    assert here.worker("r2", "--resume", "mine.txt", "--name", "other").returncode == 0
    assert here.made("r2", "other") == "r2:0.003"
    refused = here.worker("r1", "--bp", "yours.txt", "--name", "third")
    assert (refused.returncode, "ERROR 2: backbone: yours.txt: no such file" in refused.stdout) == (2, True)


def test_a_file_in_the_home_directory_is_found_there(here: Checkout) -> None:
    (here.root / "mine.txt").write_text("mine")
    words = here.worker_command("r1", "backbone=~/mine.txt")
    assert here.run(*words, HOME=str(here.root)).returncode == 0
    assert here.made("r1") == "mine r1:0.03"


def test_words_pass_through_in_any_order_and_bad_ones_leave_the_marker_alone(here: Checkout) -> None:
    assert here.worker("pretrain", "--lr", "0.25", "--name", "mine", "epochs=7").returncode == 0
    marker = here.state("pretrain", "mine")
    assert (marker["config"]["optim.lr"], marker["epochs"]) == (0.25, 7)
    refused = here.worker("pretrain", "--name", "mine", "optim.rl=1")
    assert (refused.returncode, "did you mean 'optim.lr'" in refused.stdout) == (2, True)
    assert here.state("pretrain", "mine") == marker


def test_a_second_run_of_a_running_stage_is_refused(here: Checkout) -> None:
    command = here.worker_command("pretrain", "wait_for=go")
    with here.start(*command) as first:
        marker = here.root / "runs/standin/pretrain/state.json"
        while not marker.exists():
            assert first.poll() is None
        second = here.worker("pretrain", "wait_for=go")
        assert second.returncode == 2
        assert f"runs/standin/pretrain: running already: {socket.gethostname()} (pid {first.pid})" in second.stdout
        assert here.state("pretrain")["status"] == "running"
        (here.root / "go").touch()
    assert first.returncode == 0
    assert here.state("pretrain")["status"] == "done"


def test_with_two_ranks_the_first_one_keeps_the_marker(here: Checkout) -> None:
    done = here.run(*TORCHRUN, *here.worker_command("pretrain", "ranks=meet")[1:])
    assert done.returncode == 0, done.stdout
    marker = here.state("pretrain")
    logs = sorted((here.root / "runs/standin/pretrain/logs").glob("*.log"))
    ranks = json.loads((here.root / "runs/standin/pretrain/ranks.json").read_text())
    assert ranks == {"size": 2, "mean": 0.5}
    assert [log.name for log in logs] == [f"{marker['job_id']}_0_rank{rank}.log" for rank in range(2)]
    assert (marker["status"], marker["log"]) == ("done", str(logs[0]))
    assert "rank 1 of 2: mean 0.5" in logs[1].read_text()


def test_the_cause_is_that_of_the_rank_that_failed_first(here: Checkout) -> None:
    words = here.worker_command("pretrain", "ranks=meet", "fail=error", "fail_on_rank=1")
    assert here.run(*TORCHRUN, *words[1:]).returncode != 0
    marker = here.state("pretrain")
    assert (marker["status"], marker["cause"]) == ("failed", "RuntimeError: the disk is on fire")
    assert (marker["exit_code"], marker["log"].endswith("_rank1.log")) == (1, True)
    assert "Traceback" in Path(marker["log"]).read_text()


def test_a_disk_that_is_full_has_room_for_the_cause(here: Checkout) -> None:
    (here.root / "runs").rmdir()
    with disks.mounted(here.root / "runs", "size=1m,mode=700"):
        failed = here.worker("pretrain", "fail=disk")
        assert (failed.returncode, "No space left on device" in failed.stdout) == (75, True)
        assert files.free_space(here.root / "runs") <= 1 << 14
        marker = here.state("pretrain")
    assert (marker["status"], marker["exit_code"]) == ("failed", 75)
    assert "No space left on device" in marker["cause"]


@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_what_is_made_is_ours_alone_whatever_the_umask(here: Checkout, umask: int) -> None:
    before = os.umask(umask)
    try:
        done = here.local("--chain"), here.worker("pretrain", "--name", "other")
    finally:
        os.umask(before)
    assert [run.returncode for run in done] == [0, 0], done
    folders = ["standin", "standin/pretrain", "standin/eval", "other", "other/pretrain"]
    assert {(here.root / "runs" / folder).stat().st_mode & 0o777 for folder in folders} == {0o700}


def test_a_process_of_another_host_with_the_same_id_is_not_this_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    marker = {"slurm": False, "job_id": str(os.getpid()), "step": "0", "restarts": 0, "host": socket.gethostname()}
    assert state.is_ours(marker)
    assert not state.is_ours({**marker, "host": "elsewhere"})
    assert not state.is_ours({**marker, "slurm": True})  # a job with that number
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    assert state.is_ours({**marker, "slurm": True, "host": "elsewhere"})  # ranks of one job are on several
