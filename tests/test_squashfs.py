"""Unpacking archives made by the real mksquashfs: whole, once, private."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.archives import NEEDS_TOOLS, make_sample, pack, snapshot
from utils import files, squashfs
from utils.paths import ROOT

pytestmark = NEEDS_TOOLS


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample(tmp_path_factory.mktemp("sample"))


def test_unpack_is_whole_private_and_marked(sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    archive = pack(sample, tmp_path / "a.sqsh", "-force-uid", "65534")
    dest = squashfs.unpack(archive, tmp_path / "out")
    assert snapshot(dest) == snapshot(sample)
    assert (dest.stat().st_mode & 0o7777, dest.stat().st_uid) == (0o700, os.geteuid())
    marker = json.loads((dest / squashfs.MARKER).read_text())
    contents = [found[-1] for found in snapshot(sample).values() if found[0] == "file"]
    assert marker == {
        "archive": str(archive), "size": archive.stat().st_size, "mtime_ns": archive.stat().st_mtime_ns,
        "files": len(contents) + 2, "bytes": sum(map(len, contents)),  # type: ignore[arg-type]
        "sha256": files.sha256(archive),
    }  # fmt: skip
    assert "100%" in capfd.readouterr().err


def test_without_unsquashfs_the_tree_is_the_same(
    sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(sample, tmp_path / "a.sqsh", "-comp", "xz")
    monkeypatch.setenv("PATH", "/nonexistent")
    dest = squashfs.unpack(archive, tmp_path / "out")
    assert snapshot(dest) == snapshot(sample)
    assert {path.stat().st_mode & 0o777 for path in dest.rglob("*") if path.is_dir()} == {0o700}
    assert "no unsquashfs here" in capfd.readouterr().err


def test_a_second_call_finds_it(sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    archive = pack(sample, tmp_path / "a.sqsh")
    first = squashfs.unpack(archive, tmp_path / "out").stat()
    capfd.readouterr()
    second = squashfs.unpack(archive, tmp_path / "out").stat()
    assert (second.st_ino, second.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert capfd.readouterr().err == f"{archive} is already unpacked: {tmp_path / 'out'}\n"


def test_two_processes_unpack_once(sample: Path, tmp_path: Path) -> None:
    archive, dest = pack(sample, tmp_path / "a.sqsh"), tmp_path / "out"
    command = [sys.executable, "-m", "utils.squashfs", str(archive), str(dest)]
    with files.lock(tmp_path / ".out.lock"):
        both = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in both:
            assert process.stderr
            assert process.stderr.readline() == f"waiting for another process that unpacks {dest}\n"
    outputs = [process.communicate() for process in both]
    assert [output for output, _ in outputs] == [f"{dest}\n"] * 2
    errors = "".join(error for _, error in outputs)
    assert (errors.count("unpack a.sqsh: 100%"), errors.count("already unpacked")) == (1, 1)
    assert snapshot(dest) == snapshot(sample)


def test_what_a_killed_process_left_is_removed(sample: Path, tmp_path: Path) -> None:
    archive = pack(sample, tmp_path / "a.sqsh")
    prefix = f".out.{socket.gethostname()}."
    left, link, elsewhere = tmp_path / f"{prefix}x", tmp_path / f"{prefix}y", tmp_path / "mine"
    for folder in (left, elsewhere):
        (folder / "tree").mkdir(parents=True)
        (folder / "tree" / "file").touch()
    (left / "tree").chmod(0o500)
    link.symlink_to(elsewhere)
    squashfs.unpack(archive, tmp_path / "out")
    assert not left.exists()
    assert (elsewhere / "tree" / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be an ordinary user for once")
@pytest.mark.parametrize("path", [os.environ["PATH"], "/nonexistent"])
def test_an_ordinary_user_can_unpack_read_only_folders(
    path: str, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack_as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        squashfs.unpack(archive, dest)
        shutil.rmtree(squashfs.unpack(archive, dest.with_name("again")))

    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        archive, dest = Path(name) / "a.sqsh", Path(name) / "out"
        Path(name).chmod(0o777)
        pack(sample, archive, "-root-mode", "555")
        monkeypatch.setenv("PATH", path)
        child = multiprocessing.get_context("fork").Process(target=unpack_as_nobody)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert dest.stat().st_uid == 65534
        assert snapshot(dest) == snapshot(sample)
        assert not dest.with_name("again").exists()


def test_stage_takes_an_archive_or_a_folder(sample: Path, tmp_path: Path) -> None:
    archive, root = pack(sample, tmp_path / "a.sqsh"), tmp_path / "scratch" / "relay"
    assert str(squashfs.stage(sample, root, how="unpack")) == str(sample.resolve())
    assert not root.exists()

    def staged_at() -> Path:
        return Path(str(squashfs.stage(str(archive), root, how="unpack")))

    staged = staged_at()
    assert staged.parent == root and staged.name.startswith("a-")
    assert root.stat().st_mode & 0o7777 == 0o700
    assert snapshot(staged) == snapshot(sample)
    assert staged_at() == staged
    pack(tmp_path / "scratch", archive)  # the same name, another content
    again = staged_at()
    assert again != staged and set(snapshot(again)) > {"relay", f"relay/{staged.name}"}
