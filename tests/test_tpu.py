"""A chain on TPU VMs that are taken away, against a gcloud that records its calls and runs what it is told."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.checkout import STAGES, Checkout, Process
from tests.fake_gcloud import Google
from utils.paths import ROOT

STORE = "gs://bucket/relay"
CHAIN = f"""
base: ../tests/standin/chain.yaml
name: mine
store: {STORE}
tpu: {{zone: us-central2-b, accelerator: v4-8, version: tpu-ubuntu2204-base}}
"""
MAKEFILE = r"""
install-tpu:
	mkdir -p .venv-tpu/bin
	printf '#!/bin/sh\nexec "%s" "$$@"\n' '{python}' >.venv-tpu/bin/python
	chmod +x .venv-tpu/bin/python
"""
MIRROR = '''
"""The test's bucket is a folder."""
import json, os, shutil
from pathlib import Path
from utils import checkpoint_files, paths
from utils.errors import EnvironmentProblem
from utils.mirror import move_marker

def at(url):
    folder = Path(os.environ["BUCKET"])
    if not folder.exists():
        raise EnvironmentProblem(f"{url}: no answer")
    return folder / url.removeprefix("gs://")

def pull(url, folder):
    if at(url).exists():
        shutil.copytree(at(url), folder, dirs_exist_ok=True)
        moved(folder)

def pull_markers(url, folder):
    for marker in at(url).glob("*/state.json"):
        run_dir = folder / marker.parent.name
        run_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(marker, run_dir)
        moved(run_dir)

def moved(folder):
    if (folder / "state.json").exists():
        move_marker(folder, json.loads((folder / "state.json").read_text())["config"]["run_dir"])

def newest_checkpoint(url):
    found = checkpoint_files.newest(at(url) / "checkpoints")
    return found and found.name

def begin_anew(url):
    paths.set_aside(at(url))

def fetch(path, root):
    return path
'''
XLA_RUN = '''
"""One process instead of one a chip, which records what it is given; its run directory is mirrored."""
import json, os, shutil, sys
from dataclasses import replace
from pathlib import Path

folder = Path.home().parent
with open(folder / "remote", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
assert sys.argv[1:3] == ["-m", "jobs.worker"]
os.environ["BUCKET"] = str(folder / "bucket")
(url,) = [word.removeprefix("--store=") for word in sys.argv if word.startswith("--store=")]
from jobs import worker
from utils import mirror_views
from utils.errors import cli

chain, stage, words = worker.parse([word for word in sys.argv[3:] if word != f"--store={url}"])
chain = replace(chain, store=url)
for done in chain.stages:
    mirror_views.pull(chain.url(done), chain.run_dir(done).path)
print(f"begun {stage}", flush=True)

def main():
    try:
        worker.run(replace(chain, store=None), stage, words)
    finally:
        there = mirror_views.at(chain.url(stage))
        shutil.copytree(chain.run_dir(stage).path, there, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))

cli(main)
'''


class TpuCheckout(Checkout):
    """A git checkout with a stand-in for what the VM's side and the bucket are made of, and its own Google."""

    standins: ClassVar = {"utils/mirror_views.py": MIRROR, "utils/xla_run.py": XLA_RUN}

    def __init__(self, directory: Path, google: Google | None = None) -> None:
        super().__init__(directory)
        self.google = google or Google(directory / "google")
        self.google.bucket.mkdir(parents=True, exist_ok=True)
        for name, text in {
            ".gitignore": "runs/\n.venv-tpu/\n__pycache__/\nbin/\n",
            "Makefile": MAKEFILE.replace("{python}", sys.executable),
            "jobs/mine.yaml": CHAIN,
            **self.standins,
            "bin/gcloud": f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fake_gcloud.py {self.google.folder} "$@"\n',
        }.items():
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).write_text(text)
        (self.root / "bin/gcloud").chmod(0o755)
        self.edit("jobs/tpu_gcloud.py", "POLL = 30.0", "POLL = 0.05")
        self.edit("jobs/tpu_remote.py", "PAUSE = 0.2", "PAUSE = 0.02")
        self.edit("tests/standin/config.py", "fold: int = 0", 'fold: int = 0\n    note: str = ""')
        self.edit("tests/standin/config.py", 'resume: str = "auto"', 'resume: str = "auto"\n    device: str = "auto"')
        subprocess.run(["git", "init", "-q", "."], cwd=self.root, check=True)
        self.environ["PATH"] = f"{self.root}/bin:{self.environ['PATH']}"
        self.environ["BUCKET"] = str(self.google.bucket)

    def edit(self, name: str, before: str, after: str) -> None:
        text = (self.root / name).read_text()
        assert before in text
        (self.root / name).write_text(text.replace(before, after))

    def tpu(self, *words: str) -> list[str]:
        return [sys.executable, "jobs/launch.py", "--cluster", "tpu", "--file", "jobs/mine.yaml", *words]

    def launched(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(*self.tpu(*words))

    def in_bucket(self, name: str) -> Path:
        return self.google.bucket / STORE.removeprefix("gs://") / "mine" / name

    def mine(self, stage: str) -> dict[str, object]:
        return self.state(stage, "mine")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[TpuCheckout]:
    checkout = TpuCheckout(tmp_path)
    yield checkout
    checkout.google.kill()


def verbs(google: Google) -> list[str]:
    """What gcloud was asked to do, questions left out."""
    done = [call[4] + (" request" if call[3] == "queued-resources" else "") for call in google.calls()]
    return [verb for verb in done if not verb.startswith("describe")]


def until(condition: Callable[[], object], process: Process | None = None) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert (not process or process.poll() is None) and time.monotonic() < end
        time.sleep(0.02)


ONE = ["create", "scp", "ssh", "ssh", "delete"]  # one stage, undisturbed: unpack and set up, run


def test_a_chain_runs_on_a_vm_that_is_made_and_deleted_and_the_second_time_not_at_all(here: TpuCheckout) -> None:
    shown = here.launched("--chain", "--dry-run", "data.fold=2")
    assert (shown.returncode, here.google.calls(), here.files()) == (0, [], {"runs/.gitkeep"} & here.files())
    done = here.launched("--chain", "data.fold=2")
    assert done.returncode == 0, done.stdout
    assert verbs(here.google) == ["create", "scp", "ssh", *["ssh"] * 5, "delete"]
    assert (here.google.vms(), here.google.disk.exists()) == ({}, False)
    assert here.made("eval", "mine") == "pretrain:0.015 r1:0.03 r2:0.003 r3:0.0003 eval:0.03"
    assert [here.mine(stage)["status"] for stage in STAGES] == ["done"] * 5
    assert done.stdout.endswith(" Average Precision  (AP) @[ all ] = 0.500\n")
    printed = [shlex.split(line) for line in shown.stdout.splitlines() if line.startswith("gcloud ")]
    assert [call for call in printed if call[4] != "describe"] == [
        call for call in here.google.calls() if call[4] != "describe"
    ]
    again = here.launched("--chain", "data.fold=2")
    assert again.returncode == 0
    assert [f"{stage}: done already, skipped" in again.stdout for stage in STAGES] == [True] * 5
    assert len(here.google.remote()) == 5


def test_another_machine_sees_what_is_done_and_goes_on(here: TpuCheckout, tmp_path: Path) -> None:
    assert here.launched("--only", "pretrain").returncode == 0
    other = TpuCheckout(tmp_path / "other", here.google)
    status = [sys.executable, "jobs/launch.py", "--status", "--file", "jobs/mine.yaml"]
    assert [line.split()[:2] for line in other.run(*status).stdout.splitlines()[2:4]] == [
        ["pretrain", "DONE"],
        ["r1", "TODO"],
    ]
    assert other.launched("--chain").returncode == 0
    assert [call[2] for call in here.google.remote()] == STAGES
    here.google.bucket.rename(tmp_path / "away")
    said = other.run(*status)
    assert (said.returncode, said.stdout.splitlines()[-1]) == (
        0,
        f"as far as this machine knows: {STORE}/mine: no answer",
    )


@pytest.mark.parametrize("fate", ["preempt", "terminate", "vanish"])
def test_a_vm_that_is_taken_away_is_replaced_and_the_stage_goes_on_from_the_bucket(
    here: TpuCheckout, fate: str
) -> None:
    saved = here.in_bucket("pretrain/checkpoints/checkpoint_0000_00000001.pth")
    saved.parent.mkdir(parents=True)
    saved.touch()
    here.google.want(ssh=[["jobs.worker pretrain", "begun", fate]])
    here.edit("tests/standin/train.py", "    if cfg.wait_for:", WAITS_ON_THE_FIRST_VM)
    done = here.launched("--only", "pretrain")
    assert done.returncode == 0, done.stdout
    deleted = [] if fate == "vanish" else ["delete"]
    assert verbs(here.google) == [*ONE[:-1], *deleted, *ONE]
    state = {"preempt": "PREEMPTED", "terminate": "TERMINATED", "vanish": "gone"}[fate]
    assert f" is {state}; it goes on from {saved.name}\n" in done.stdout
    first, second = here.google.remote()
    assert first == second
    assert (here.root / "runs/mine/pretrain/checkpoints" / saved.name).exists()


WAITS_ON_THE_FIRST_VM = """\
    if len((Path.home().parent / "remote").read_text().splitlines()) == 1:
        _wait(Path("never"), run_dir, True, 0.0)
    if cfg.wait_for:"""


def test_without_progress_it_is_tried_four_times_and_with_progress_for_as_long_as_it_takes(here: TpuCheckout) -> None:
    here.google.want(ssh=[["jobs.worker pretrain", "begun", "preempt"]] * 9)
    given_up = here.launched("--only", "pretrain", "pretrain.wait_for=never")
    assert given_up.returncode == 75
    cause = f"4 attempts in a row came no further than its beginning; now {name(here)} is PREEMPTED"
    assert given_up.stdout.endswith(f"ERROR 75: pretrain: {cause}\n")
    assert (len(here.google.remote()), here.google.vms()) == (4, {})


def name(here: TpuCheckout) -> str:
    return next(call[5] for call in here.google.calls())


TEXTS = ["begun", *["runs here already"] * 5]
FATES = ["drop", *["lose"] * 5]  # more than may go by without progress


def test_a_broken_connection_disturbs_nothing(here: TpuCheckout) -> None:
    assert here.launched("--only", "pretrain").returncode == 0
    here.google.want(ssh=[["jobs.worker r1", text, fate] for text, fate in zip(TEXTS, FATES, strict=True)])
    with here.start(*here.tpu("--only", "r1", f"r1.wait_for={here.root}/go")) as launcher:
        until(lambda: printed(here, "r1").count("runs here already") == len(FATES), launcher)
        (here.root / "go").touch()
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    assert [call[2] for call in here.google.remote()] == ["pretrain", "r1"]
    assert output.count(f"the connection to {name(here)} is lost") == 5
    assert here.mine("r1")["status"] == "done"


def test_a_launcher_that_was_killed_is_run_again_and_follows_the_stage(here: TpuCheckout) -> None:
    words = here.tpu("--only", "pretrain", f"pretrain.wait_for={here.root}/go")
    with here.start(*words) as first:
        until(lambda: "listening" in printed(here), first)
        first.kill()
    (here.root / "Makefile").write_text((here.root / "Makefile").read_text() + "# newer code\n")
    with here.start(*words) as second:
        until(lambda: "runs here already" in printed(here), second)
        (here.root / "go").touch()
        output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    assert "it runs here already" in output
    assert len(here.google.remote()) == 1
    assert verbs(here.google) == ["create", *["scp", "ssh", "ssh"] * 2, "ssh", "delete"]


def test_a_stage_whose_processes_are_killed_is_started_again(here: TpuCheckout) -> None:
    here.google.want(ssh=[["jobs.worker pretrain", "listening", "kill"]])
    here.edit("tests/standin/train.py", "    if cfg.wait_for:", WAITS_ON_THE_FIRST_VM)
    done = here.launched("--only", "pretrain")
    assert done.returncode == 0, done.stdout
    assert "pretrain: its processes were killed (exit code 137); it goes on from its beginning" in done.stdout
    assert len(here.google.remote()) == 2


def test_a_failure_of_the_stage_itself_ends_the_launch_with_its_code_and_its_log(here: TpuCheckout) -> None:
    failed = here.launched("--chain", "r1.fail=error")
    assert (failed.returncode, here.google.vms()) == (1, {}), failed.stdout
    line = failed.stdout.splitlines()[-1]
    log, output = line.removesuffix(")").split(" (log: ")[1].split("; what it printed: ")
    assert line.startswith(
        f"ERROR 1: r1 failed: RuntimeError: the disk is on fire (log: {here.root}/runs/mine/r1/logs/"
    )
    assert "is on fire" in Path(log).read_text()
    assert "is on fire" in Path(output).read_text()
    assert [call[2] for call in here.google.remote()] == ["pretrain", "r1"]
    shutil.rmtree(here.in_bucket("pretrain"))
    refused = here.launched("--only", "r1")
    assert refused.returncode == 2
    cause = "ERROR 2: r1: r1 has begun from something its parent does not have any more; "
    assert refused.stdout.splitlines()[-1].startswith(cause)


@pytest.fixture
def hangups() -> Iterator[None]:
    """They are heard, though `nohup` may have started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("kept", [False, True], ids=["deleted", "kept"])
def test_asked_to_end_it_has_the_stage_save_its_work_first(here: TpuCheckout, number: int, kept: bool) -> None:
    words = ["pretrain.wait_for=never"]
    if kept:
        here.edit("jobs/mine.yaml", "version: tpu-ubuntu2204-base", "name: theirs")
        with here.google.state() as state:
            state["vms"]["theirs"] = "READY"
        here.google.disk.mkdir()
    with here.start(*here.tpu("--only", "pretrain", *words)) as launcher:
        until(lambda: "listening" in printed(here), launcher)
        launcher.send_signal(number)
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    assert "pretrain: stopped by SIGTERM after step 1; the same command goes on from there" in output
    assert here.in_bucket("pretrain/checkpoints/checkpoint_0000_00000001.pth").exists()
    assert here.mine("pretrain")["status"] == "preempted"
    assert here.google.vms() == ({"theirs": "READY"} if kept else {})
    assert (("theirs is kept" in output), ("deleting it" in output)) == (kept, not kept)


def printed(here: TpuCheckout, stage: str = "pretrain") -> str:
    file = here.root / f"runs/mine/submitted/tpu_{stage}.log"
    return file.read_text() if file.exists() else ""


def test_asked_a_second_time_it_gives_the_stage_up(here: TpuCheckout) -> None:
    with here.start(
        *here.tpu("--only", "pretrain", "pretrain.wait_for=never", "pretrain.save_seconds=600")
    ) as launcher:
        until(lambda: "listening" in printed(here), launcher)
        launcher.send_signal(signal.SIGINT)
        until(lambda: "jobs.tpu_remote stop" in str(here.google.calls()[-1]), launcher)
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=60)
    assert (launcher.returncode, here.google.vms()) == (130, {})
    assert output.endswith("interrupted; the same command goes on from there\n")


def test_asked_to_end_while_the_vm_is_waited_for_it_takes_the_request_back(here: TpuCheckout) -> None:
    here.edit("jobs/mine.yaml", "zone:", "queued: true, zone:")
    here.google.want(queue=10**6)
    with here.start(*here.tpu("--chain")) as launcher:
        until(lambda: len(here.google.calls()) > 8, launcher)
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=60)
    assert (launcher.returncode, verbs(here.google)) == (130, ["create request", "delete request"])
    assert output.count("waiting, WAITING_FOR_RESOURCES") == 1


def test_a_queued_vm_is_waited_for_and_a_request_that_lost_its_vm_is_replaced(here: TpuCheckout) -> None:
    here.edit("jobs/mine.yaml", "zone:", "queued: true, spot: true, project: p, zone:")
    here.google.want(queue=3)
    assert here.launched("--only", "pretrain").returncode == 0
    assert next(call for call in here.google.calls() if call[4] == "create")[3:] == [
        "queued-resources",
        "create",
        name(here),
        "--accelerator-type=v4-8",
        f"--node-id={name(here)}",
        "--runtime-version=tpu-ubuntu2204-base",
        "--valid-until-duration=6h",
        "--spot",
        "--zone=us-central2-b",
        "--project=p",
        "--quiet",
    ]
    assert here.google.calls()[-1][3:7] == ["queued-resources", "delete", name(here), "--force"]
    with here.google.state() as state:
        assert state == {"vms": {}, "requests": {}}
        state["requests"][name(here)] = "SUSPENDED"
    before = len(verbs(here.google))
    assert here.launched("--only", "r1").returncode == 0
    assert verbs(here.google)[before:][:2] == ["delete request", "create request"]


def test_a_zone_without_room_is_asked_again_and_a_quota_is_told(here: TpuCheckout) -> None:
    here.google.want(refuse={"create": ['There is no more capacity in the zone "us-central2-b"; ...'] * 2})
    done = here.launched("--only", "pretrain")
    assert done.returncode == 0
    assert (verbs(here.google), "waiting, us-central2-b has no room" in done.stdout) == (["create"] * 2 + ONE, True)
    here.google.want(refuse={"create": ["RESOURCE_EXHAUSTED: Quota limit 'TPUV4' has been exceeded. Limit: 0"]})
    told = here.launched("--only", "r1")
    assert (told.returncode, "Quota limit 'TPUV4' has been exceeded" in told.stdout) == (75, True)


def test_a_vm_of_yours_is_used_and_kept(here: TpuCheckout) -> None:
    here.edit("jobs/mine.yaml", "accelerator: v4-8, version: tpu-ubuntu2204-base", "name: theirs")
    missing = here.launched("--chain")
    assert (missing.returncode, "tpu.name=theirs: no such TPU VM in us-central2-b" in missing.stdout) == (2, True)
    with here.google.state() as state:
        state["vms"]["theirs"] = "READY"
    here.google.disk.mkdir()
    assert here.launched("--only", "pretrain").returncode == 0
    again = here.launched("--only", "pretrain", "optim.lr=0.5")
    assert again.returncode == 0, again.stdout
    assert here.made("pretrain", "mine") == "pretrain:0.5"
    assert (here.root / "runs/mine/pretrain.1").exists()
    assert here.in_bucket("pretrain.1").exists()
    assert len(list(here.google.disk.glob("relay-*/runs/mine/pretrain.*"))) == 1
    here.google.want(ssh=[["jobs.worker r1", "begun", "preempt"]])
    lost = here.launched("--only", "r1", "r1.wait_for=never")
    assert (lost.returncode, "theirs is PREEMPTED; it is not the launcher's to replace" in lost.stdout) == (75, True)
    assert {"create", "delete"}.isdisjoint(verbs(here.google))


def test_a_vm_that_cannot_be_deleted_is_named(here: TpuCheckout) -> None:
    here.edit("jobs/tpu_gcloud.py", "PATIENCE = 30 ", "PATIENCE = 0.01 ")
    here.google.want(refuse={"delete": ["INTERNAL: try later"] * 99})
    done = here.launched("--only", "pretrain")
    assert done.returncode == 75
    command = shlex.join(here.google.calls()[-1])
    assert f"{name(here)} may still be there, and cost: {command}\n" in done.stdout
    assert (verbs(here.google)[-2:], here.mine("pretrain")["status"]) == (["delete"] * 2, "done")


LOGIN = "You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login\n"


def test_who_is_not_logged_in_or_has_no_gcloud_is_told_in_a_line(here: TpuCheckout) -> None:
    here.google.want(deny=LOGIN)
    denied = here.launched("--chain")
    assert (denied.returncode, len(here.google.calls())) == (75, 1)
    assert denied.stdout.splitlines()[-1].startswith("ERROR 75: gcloud is not logged in: run `gcloud auth login`")
    (here.root / "bin/gcloud").unlink()
    (here.root / "bin/git").symlink_to(str(shutil.which("git")))
    without = here.run(*here.tpu("--chain"), PATH=f"{here.root}/bin")
    assert (without.returncode, without.stdout.splitlines()[-1]) == (
        75,
        "ERROR 75: gcloud: no such program; install the Google Cloud CLI, then `gcloud init`",
    )
