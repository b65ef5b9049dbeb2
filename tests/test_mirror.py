"""A run directory kept in a bucket: what is there after kills, cuts and a second attempt."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from tests.gcs_server import Fault, Server, gcs, hasty
from tests.test_ssl_train import SMALL, write_images
from utils import checkpoint_files, files, manifest, metrics, mirror_views, storage
from utils.errors import CheckpointError, EnvironmentProblem, InputError
from utils.mirror import Mirror
from utils.paths import RunDir

__all__ = ["gcs", "hasty"]  # fixtures
URL = "gs://bucket/relay/mine/r1"


def saved(folder: Path, epoch: int, content: bytes) -> Path:
    path = RunDir(folder).checkpoints / checkpoint_files.name(epoch)
    checkpoint_files.record(path, files.write_atomic(path, lambda file: file.write(content)))
    return path


def begun(folder: Path) -> Mirror:
    mirror = Mirror(URL, folder)
    mirror.pull()
    return mirror


def names(gcs: Server) -> set[str]:
    return {one.url.removeprefix(f"{URL}/") for one in storage.listing(URL)}


def test_what_was_pushed_is_on_another_machine(gcs: Server, tmp_path: Path) -> None:
    here, there = tmp_path / "a" / "mine" / "r1", tmp_path / "b" / "mine" / "r1"
    mirror = begun(here)
    best = saved(here, 3, b"weights" * 1000)
    os.link(best, best.with_name("best.pth"))
    files.write_json(RunDir(here).state, {"outputs": {"last": {"path": str(best)}}, "backbone": "/elsewhere/x.pth"})
    (here / ".claim_1.json").write_text("{}")
    mirror.push()
    assert sum(name.endswith(".pth") for name in names(gcs)) == 1  # the best is the same file
    begun(there)
    moved = RunDir(there).checkpoints
    assert (moved / best.name).read_bytes() == (moved / "best.pth").read_bytes() == best.read_bytes()
    assert json.loads(RunDir(there).state.read_text()) == {
        "outputs": {"last": {"path": str(moved / best.name)}},
        "backbone": "/elsewhere/x.pth",
    }
    assert not (there / ".claim_1.json").exists()


def test_a_push_that_is_cut_off_leaves_what_was_there_before(gcs: Server, tmp_path: Path, hasty: None) -> None:
    mirror = begun(tmp_path / "run")
    saved(tmp_path / "run", 0, b"first")
    mirror.push()
    saved(tmp_path / "run", 1, b"second")
    gcs.faults = [Fault("write", r".*manifest.*", status=503)]
    with pytest.raises(EnvironmentProblem, match="503"):
        mirror.push()
    gcs.faults = []
    begun(tmp_path / "other")
    assert [path.name for path in checkpoint_files.everything(tmp_path / "other" / "checkpoints")] == [
        "checkpoint_0000.pth"
    ]
    mirror.push()  # the same attempt goes on
    assert "checkpoints/checkpoint_0001.pth" in manifest.newest(URL).files


def test_nothing_is_left_that_two_manifests_do_not_name(gcs: Server, tmp_path: Path) -> None:
    mirror = begun(tmp_path / "run")
    gcs.put("relay/mine/r1/objects/checkpoints/left.12345678.pth", b"of an attempt that was killed")
    theirs = gcs.put("relay/mine/r1/holiday.jpg", b"somebody else's")
    for epoch in range(4):
        saved(tmp_path / "run", epoch, b"%d" % epoch)
        checkpoint_files.prune(tmp_path / "run" / "checkpoints")
        mirror.push()
    found = names(gcs)
    assert {name for name in found if "manifest" in name} == {"manifest_00000003.json", "manifest_00000004.json"}
    assert sorted(name.split(".")[0] for name in found if name.endswith(".pth")) == [
        f"objects/checkpoints/checkpoint_000{epoch}" for epoch in (1, 2, 3)
    ]
    assert storage.info(theirs)


def test_a_bucket_that_lets_nothing_be_deleted(gcs: Server, tmp_path: Path, hasty: None) -> None:
    mirror = begun(tmp_path / "run")
    gcs.faults = [Fault("delete", status=403)]
    for epoch in range(4):
        saved(tmp_path / "run", epoch, b"%d" % epoch)
        mirror.push()
    assert manifest.newest(URL).number == 4


def test_a_url_that_is_nothing_says_so(gcs: Server, tmp_path: Path) -> None:
    for url in ("gs://bucket/best.pth", "gs://bucket/runs/r1/checkpoints/best.pth"):
        with pytest.raises(InputError, match=f"{url}: not found"):
            mirror_views.fetch(url, tmp_path)


def test_an_attempt_that_comes_back_writes_no_more(gcs: Server, tmp_path: Path) -> None:
    old = begun(tmp_path / "old")
    saved(tmp_path / "old", 0, b"first")
    old.push()
    new = begun(tmp_path / "new")
    saved(tmp_path / "new", 1, b"of the new attempt")
    new.push()
    saved(tmp_path / "old", 1, b"of the old attempt")
    with pytest.raises(EnvironmentProblem, match="taken over"):
        old.push()
    begun(tmp_path / "third")
    assert (tmp_path / "third/checkpoints/checkpoint_0001.pth").read_bytes() == b"of the new attempt"


def test_two_that_write_the_same_number_at_once(gcs: Server, tmp_path: Path) -> None:
    given = [manifest.Manifest(1, str(tmp_path / each), {}) for each in ("a", "b")]
    manifest.write(URL, given[0])
    with pytest.raises(EnvironmentProblem, match="taken over"):
        manifest.write(URL, given[1])


def test_checkpoints_of_another_history_are_set_aside(gcs: Server, tmp_path: Path) -> None:
    """This machine had saved more than it could push; meanwhile another went on from the bucket."""
    here = begun(tmp_path / "here")
    saved(tmp_path / "here", 0, b"0")
    here.push()
    other = begun(tmp_path / "other")
    saved(tmp_path / "here", 5, b"never pushed")
    saved(tmp_path / "other", 1, b"1")
    other.push()
    begun(tmp_path / "here")
    found = checkpoint_files.everything(tmp_path / "here" / "checkpoints")
    assert [path.name for path in found] == ["checkpoint_0000.pth", "checkpoint_0001.pth"]
    assert (tmp_path / "here/checkpoints.1/checkpoint_0005.pth").read_bytes() == b"never pushed"


def test_an_object_that_was_exchanged_is_refused(gcs: Server, tmp_path: Path) -> None:
    mirror = begun(tmp_path / "run")
    saved(tmp_path / "run", 0, b"weights")
    mirror.push()
    (name,) = [name for name in names(gcs) if name.endswith(".pth")]
    gcs.put(f"relay/mine/r1/{name}", b"WEIGHTS")
    with pytest.raises(CheckpointError, match="sha256"):
        begun(tmp_path / "other")
    with pytest.raises(CheckpointError, match="sha256"):
        mirror_views.fetch(f"{URL}/checkpoints/checkpoint_0000.pth", tmp_path)


def test_a_file_by_the_name_it_has_in_the_run_directory(gcs: Server, tmp_path: Path) -> None:
    mirror = begun(tmp_path / "run")
    saved(tmp_path / "run", 7, b"weights")
    mirror.push()
    assert mirror_views.fetch(f"{URL}/checkpoints/checkpoint_0007.pth", tmp_path / "cache").read_bytes() == b"weights"
    assert mirror_views.newest_checkpoint(URL) == "checkpoint_0007.pth"


def test_begun_anew_it_holds_nothing_and_loses_nothing(gcs: Server, tmp_path: Path) -> None:
    mirror = begun(tmp_path / "run")
    saved(tmp_path / "run", 0, b"weights")
    mirror.push()
    before = names(gcs)
    mirror_views.begin_anew(URL)
    again = begun(tmp_path / "again")
    assert not checkpoint_files.everything(tmp_path / "again" / "checkpoints")
    for epoch in range(3):
        saved(tmp_path / "again", 0, b"%d" % epoch)
        again.push()
    assert {name for name in before if name.endswith(".pth")} < names(gcs)


def test_a_run_killed_and_its_disk_lost_goes_on_from_the_bucket(gcs: Server, tmp_path: Path) -> None:
    """Its losses are those of a run that nothing disturbed."""
    words = [*SMALL, f"data.unlabeled={write_images(tmp_path / 'images', 40)}", "epochs=2", "checkpoint.every_steps=5"]
    program = [sys.executable, "-m", "ssl_train.train", *words]
    whole = ranks.run([*program, f"run_dir={tmp_path / 'whole'}"])
    assert whole.returncode == 0, whole.stderr
    url = f"gs://bucket/{secrets.token_hex(8)}"
    disk = RunDir.of(url).path.parent
    started = {"env": ranks.environment({}), "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    try:
        with subprocess.Popen([*program, f"run_dir={url}"], **started) as killed:  # type: ignore[call-overload]
            next(line for line in killed.stdout if "checkpoint_0001_" in line)
            os.killpg(killed.pid, signal.SIGKILL)
        shutil.rmtree(disk)
        resumed = ranks.run([*program, f"run_dir={url}"])
        assert resumed.returncode == 0, resumed.stderr
        assert re.search(r"checkpoint_000[01]\S*: moco after 1 epochs", resumed.stdout)
        assert losses(RunDir.of(url)) == losses(RunDir(tmp_path / "whole"))
    finally:
        shutil.rmtree(disk)


def losses(run_dir: RunDir) -> list[float]:
    return [line["loss"] for line in metrics.read(run_dir.metrics) if line["kind"] == "train"]
