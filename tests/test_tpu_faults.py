"""--cluster tpu on a bad day: no network, no terminal, somebody else's stage, a machine that fails."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import tpu_code
from tests.checkout import Process
from tests.test_tpu import ONE, WAITS_ON_THE_FIRST_VM, TpuCheckout, here, name, printed, until, verbs
from utils import manifest
from utils.errors import InputError
from utils.paths import ROOT

__all__ = ["here"]  # a fixture
OUTAGE = (  # what gcloud says, word by word
    "There was a problem refreshing your current auth tokens: HTTPSConnectionPool(host='oauth2.googleapis.com', "
    'port=443): Max retries exceeded with url: /token (Caused by NameResolutionError("<urllib3.connection.'
    "HTTPSConnection object at 0x7eff42b85070>: Failed to resolve 'oauth2.googleapis.com'\"))\n"
    "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials."
)
WAITS = ["--only", "pretrain", "pretrain.wait_for=never"]


def begun(here: TpuCheckout, launcher: Process, times: int = 1) -> None:
    until(lambda: printed(here).count("listening") == times, launcher)


def said(launcher: Process, text: str) -> str:
    """What the launcher prints until `text`."""
    assert launcher.stdout
    lines: list[str] = []
    while not lines or text not in lines[-1]:
        lines.append(launcher.stdout.readline())
        assert lines[-1], lines
    return "".join(lines)


def test_a_network_that_comes_back_disturbs_nothing(here: TpuCheckout) -> None:
    here.edit("jobs/tpu_gcloud.py", "PATIENCE = 30 ", "PATIENCE = 1 ")
    here.environ["BUCKET"] = str(here.root / "bucket")  # the VM has a way of its own
    (here.root / "bucket").symlink_to(here.google.bucket)
    with here.start(*here.tpu("--only", "pretrain", f"pretrain.wait_for={here.root}/go")) as launcher:
        begun(here, launcher)
        (here.root / "bucket").unlink()
        here.google.want(deny=OUTAGE)
        here.google.cut()
        said(launcher, "mine: no answer; trying again for 1 minutes\n")
        (here.root / "bucket").symlink_to(here.google.bucket)
        said(launcher, "to obtain new credentials.; trying again for 1 minutes\n")
        here.google.want(refuse={"scp": [OUTAGE] * 2})
        said(launcher, "the connection to")
        until(lambda: "runs here already" in printed(here), launcher)
        (here.root / "go").touch()
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    assert output.count("trying again") == 1
    assert (len(here.google.remote()), here.mine("pretrain")["status"]) == (1, "done")
    assert verbs(here.google) == ["create", "scp", "ssh", "ssh", *["scp"] * 3, "ssh", "ssh", "delete"]


def test_a_network_that_does_not_come_back_ends_the_launch(here: TpuCheckout) -> None:
    here.edit("jobs/tpu_gcloud.py", "PATIENCE = 30 ", "PATIENCE = 0.01 ")
    with here.start(*here.tpu(*WAITS)) as launcher:
        begun(here, launcher)
        here.google.want(deny=OUTAGE)
        here.google.cut()
        output, _ = launcher.communicate(timeout=60)
    assert (launcher.returncode, len(here.google.remote())) == (75, 1)
    assert f"{name(here)} may still be there, and cost: " in output
    assert output.splitlines()[-1].startswith(f"ERROR 75: gcloud tpu-vm describe {name(here)}")


def test_an_outage_is_told_at_once_at_the_beginning_and_no_reason_to_log_in(here: TpuCheckout) -> None:
    here.google.want(deny=OUTAGE)
    denied = here.launched("--only", "pretrain")
    assert (denied.returncode, len(here.google.calls())) == (75, 1)
    assert ": cannot reach Google: " in denied.stdout
    assert "not logged in" not in denied.stdout
    here.google.want(refuse={"create": [OUTAGE]})
    done = here.launched("--only", "pretrain")
    assert (done.returncode, "waiting, Google cannot be reached" in done.stdout) == (0, True)
    assert verbs(here.google) == ["create", *ONE]


def test_it_pauses_before_it_connects_again(here: TpuCheckout) -> None:
    here.edit("jobs/tpu_gcloud.py", "POLL = 0.05", "POLL = 600.0")
    with here.start(*here.tpu(*WAITS)) as launcher:
        begun(here, launcher)
        here.google.cut()
        said(launcher, "it goes on from its beginning")
        before = len(here.google.calls())
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.wait(3)
        assert len(here.google.calls()) == before
        launcher.terminate()
        launcher.communicate(timeout=60)


@pytest.mark.parametrize("ends", ["by itself", "asked to"])
def test_without_a_terminal_it_goes_on_and_is_heard(here: TpuCheckout, ends: str) -> None:
    with here.start(*here.tpu("--only", "pretrain", f"pretrain.wait_for={here.root}/go")) as launcher:
        begun(here, launcher)
        assert launcher.stdout
        launcher.stdout.close()
        if ends == "by itself":
            (here.root / "go").touch()
        else:
            launcher.send_signal(signal.SIGTERM)
        code = launcher.wait(60)
    assert (code, here.google.vms(), len(here.google.remote())) == (0, {}, 1)
    assert here.mine("pretrain")["status"] == ("done" if ends == "by itself" else "preempted")
    assert printed(here).endswith("relay-tpu: the stage ended with 0\n")


def test_a_stage_that_runs_with_another_command_is_neither_followed_nor_deleted(
    here: TpuCheckout, tmp_path: Path
) -> None:
    other = TpuCheckout(tmp_path / "other", here.google)
    with here.start(*here.tpu("--only", "pretrain", f"pretrain.wait_for={here.root}/go")) as launcher:
        begun(here, launcher)
        refused = other.launched(*WAITS)
        assert refused.returncode == 2, refused.stdout
        line = refused.stdout.splitlines()[-1]
        assert line.startswith(f"ERROR 2: pretrain runs on {name(here)} with another command: .venv-tpu/bin/python ")
        assert f" wait_for={here.root}/go device=xla; end its launcher with Ctrl-C, or if" in line
        stop = line.partition(" is gone: ")[2]
        assert f"{name(here)} is kept: it was there before" in refused.stdout
        broken = TpuCheckout(tmp_path / "broken", here.google)
        here.google.want(refuse={"scp": [OUTAGE]})
        failed = broken.launched("--only", "pretrain")
        assert (failed.returncode, f"{name(here)} is kept: it was" in failed.stdout) == (75, True)
        assert (here.google.vms(), launcher.poll()) == ({name(here): "READY"}, None)
        launcher.kill()
    assert other.run(*shlex.split(stop)).returncode == 0
    ended = here.google.disk / f".relay/{name(here)}/pretrain.code"
    until(ended.exists)
    done = other.launched("--only", "pretrain")
    assert done.returncode == 0, done.stdout
    assert other.in_bucket("pretrain/checkpoints/checkpoint_0000_00000001.pth").exists()
    assert here.google.vms() == {}


def test_a_vm_that_another_launcher_has_just_made_is_kept(here: TpuCheckout) -> None:
    here.google.want(refuse={"create": ["ALREADY_EXISTS: it is there"]})
    failed = here.launched("--only", "pretrain")
    assert failed.returncode == 75 and "ALREADY_EXISTS: it is there; the same command uses it" in failed.stdout
    assert verbs(here.google) == ["create"]


def test_a_vm_on_which_somebody_s_stage_runs_is_kept_at_the_end(here: TpuCheckout) -> None:
    assert here.launched("--only", "pretrain").returncode == 0
    with here.google.state() as state:
        state["vms"][name(here)] = "READY"
    lock = here.google.disk / ".relay/another/r1.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = here.launched("--only", "r1")
    assert done.returncode == 0 and f"{name(here)} is kept: it was there before" in done.stdout
    assert here.google.vms() == {name(here): "READY"}
    assert here.launched("--only", "r2").returncode == 0
    assert here.google.vms() == {}


def test_a_wish_to_end_outlives_the_connection(here: TpuCheckout) -> None:
    with here.start(*here.tpu(*WAITS)) as launcher:
        begun(here, launcher)
        here.google.want(refuse={"ssh": [OUTAGE]})
        launcher.send_signal(signal.SIGTERM)
        until(lambda: here.google.wanted("refuse") == {"ssh": []}, launcher)
        here.google.cut()
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    assert "the connection to" in output and "; the same command goes on from there" in output
    assert (here.mine("pretrain")["status"], here.google.vms()) == ("preempted", {})
    assert here.in_bucket("pretrain/checkpoints/checkpoint_0000_00000001.pth").exists()


def test_only_the_stage_that_was_meant_is_asked_to_end(tmp_path: Path) -> None:
    remote = [sys.executable, "-m", "jobs.tpu_remote"]
    environ = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def stop(*command: str) -> str:
        words = [*remote, "stop", "chain", "r1", *command]
        return subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout

    with subprocess.Popen([*remote, "run", "chain", "r1", "sleep", "60"], env=environ, stdout=subprocess.PIPE) as run:
        assert run.stdout and run.stdout.readline()
        assert stop("sleep", "61") == "nothing runs here\n"
        assert run.poll() is None
        assert stop("sleep", "60") == ""
        assert run.wait(30) == 128 + signal.SIGTERM


def test_an_attempt_that_another_has_replaced_is_not_made_again(here: TpuCheckout) -> None:
    said = f'raise EnvironmentProblem("{manifest.TAKEN_OVER}")\n    if cfg.wait_for:'
    here.edit("tests/standin/train.py", "if cfg.wait_for:", said)
    here.edit("tests/standin/train.py", "import Stopped", "import EnvironmentProblem, Stopped")
    failed = here.launched("--only", "pretrain")
    assert (failed.returncode, len(here.google.remote())) == (75, 1)
    assert manifest.TAKEN_OVER in failed.stdout.splitlines()[-1]


def test_a_machine_that_fails_is_gone_on_from(here: TpuCheckout) -> None:
    wait = '_wait(Path("never"), run_dir, True, 0.0)'
    fails = WAITS_ON_THE_FIRST_VM.replace(wait, 'raise EnvironmentProblem("the bucket does not answer")')
    here.edit("tests/standin/train.py", "    if cfg.wait_for:", fails)
    here.edit("tests/standin/train.py", "import Stopped", "import EnvironmentProblem, Stopped")
    done = here.launched("--only", "pretrain")
    assert done.returncode == 0, done.stdout
    assert "pretrain: the bucket does not answer (exit code 75); it goes on from its beginning\n" in done.stdout
    here.edit("tests/standin/train.py", "splitlines()) == 1:", "splitlines()) > 0:")
    failed = here.launched("--only", "r1")
    assert failed.returncode == 75
    assert "r1: 4 attempts in a row came no further than its beginning; now the bucket does" in failed.stdout
    assert len(here.google.remote()) == 2 + 4


def test_a_request_whose_vm_is_gone_is_replaced(here: TpuCheckout) -> None:
    here.edit("jobs/mine.yaml", "zone:", "queued: true, spot: true, zone:")
    here.google.want(ssh=[["jobs.worker pretrain", "begun", "vanish"]])
    here.edit("tests/standin/train.py", "    if cfg.wait_for:", WAITS_ON_THE_FIRST_VM)
    done = here.launched("--only", "pretrain")
    assert done.returncode == 0, done.stdout
    assert f"{name(here)} is REMOVED: deleting it\n" in done.stdout
    life = ["create request", "scp", "ssh", "ssh", "delete request"]
    assert verbs(here.google) == life * 2


def test_older_copies_of_the_code_are_removed_from_a_vm_that_is_kept_if_nothing_runs(here: TpuCheckout) -> None:
    here.edit("jobs/mine.yaml", "accelerator: v4-8, version: tpu-ubuntu2204-base", "name: theirs")
    with here.google.state() as state:
        state["vms"]["theirs"] = "READY"
    (here.google.disk / "relay-of-mine").mkdir(parents=True)
    with here.start(*here.tpu("--only", "pretrain", f"pretrain.wait_for={here.root}/go")) as launcher:
        begun(here, launcher)
        launcher.kill()
    (first,) = here.google.disk.glob("relay-????????????")
    (here.root / "newer").touch()
    with here.start(*here.tpu("--only", "pretrain", f"pretrain.wait_for={here.root}/go")) as launcher:
        until(lambda: "runs here already" in printed(here), launcher)
        assert len(list(here.google.disk.glob("relay-*"))) == 5
        (here.root / "go").touch()
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    (here.root / "newest").touch()
    assert here.launched("--only", "r1").returncode == 0
    assert not first.exists()
    kept, archive, mine = sorted(path.name for path in here.google.disk.glob("relay-*"))
    assert (archive, mine) == (f"{kept}.tar.gz", "relay-of-mine")


def test_a_copy_that_is_too_large_is_refused_with_the_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for file, size in {"data.bin": 60 << 20, "more.bin": 4 << 20, "small": 0}.items():
        (tmp_path / file).touch()
        os.truncate(tmp_path / file, size)
    monkeypatch.setattr(tpu_code, "ROOT", tmp_path)
    assert tpu_code.pack().names == {"data.bin", "more.bin", "small"}
    (tmp_path / "small").write_text("x")
    with pytest.raises(InputError, match=r"64 MiB, and 64 at most; .* data\.bin \(60\.0 MiB\), more\.bin \(4\.0 MiB"):
        tpu_code.pack()
