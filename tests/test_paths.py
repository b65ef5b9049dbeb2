"""Names, folders and who may write to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils import paths
from utils.errors import EnvironmentProblem, InputError


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "$(id)", "x" * 65, "a\nb", "name\n", "\u0661", "-\t"])
def test_a_name_that_could_leave_the_runs_folder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="chain name"):
        paths.ChainDir.named(name)


def test_work_is_set_aside_under_the_first_free_name(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "r1").mkdir()
        paths.set_aside(tmp_path / "r1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r1.1", "r1.2"]


def test_staging_prefers_the_job_s_own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = paths.RunDir(tmp_path / "chain" / "r1")
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    monkeypatch.delenv("RELAY_SCRATCH", raising=False)
    assert paths.staging_root(run_dir) == tmp_path / "chain" / "staged"
    monkeypatch.setenv("RELAY_SCRATCH", "/scratch/me")
    assert paths.staging_root(run_dir) == Path("/scratch/me/relay")
    monkeypatch.setenv("SLURM_TMPDIR", "/tmp/job")
    assert paths.staging_root(run_dir) == Path("/tmp/job/relay")


def test_a_run_directory_is_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        paths.make_private(tmp_path / "runs" / "chain" / "r1")
    finally:
        os.umask(before)
    for folder in ("runs", "runs/chain", "runs/chain/r1"):
        assert (tmp_path / folder).stat().st_mode & 0o7777 == 0o700
    paths.make_private(tmp_path / "runs" / "chain" / "r1")


def test_a_sticky_folder_above_is_fine(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    paths.make_private(tmp_path / "r1")


@pytest.mark.parametrize(
    "planted, reason",
    [
        ("open to all", "others can write there; use chmod go-w"),
        ("open to the group", "others can write there; use chmod go-w"),
        ("open above", "others can exchange it; use chmod go-w"),
        ("link", "must be a real folder of this user"),
        ("file", "must be a real folder of this user"),
        ("foreign", "must be a real folder of this user"),
        ("below a file", "cannot be made: Not a directory"),
        ("dangling link", "must be a real folder of this user"),
    ],
)
def test_a_run_directory_that_others_could_have_planted_is_refused(planted: str, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "chain" / "r1"
    folder.mkdir(parents=True)
    if planted.startswith("open"):
        (folder.parent if planted == "open above" else folder).chmod(0o770 if planted.endswith("group") else 0o777)
    elif planted == "foreign":
        if os.geteuid():
            pytest.skip("needs root, to give a folder away")
        os.chown(folder, 65534, 65534)
    else:
        folder.rmdir()
        if planted == "file":
            folder.touch()
        elif planted == "below a file":
            folder.touch()
            folder = folder / "r1"
        else:
            folder.symlink_to(tmp_path if planted == "link" else "nowhere")
    with pytest.raises(EnvironmentProblem, match=f"{folder}: {reason}"):
        paths.make_private(folder)
