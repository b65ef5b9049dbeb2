"""Atomic writes and locks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from tests.disks import make_read_only, mounted
from utils import files, paths
from utils.errors import EnvironmentProblem


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    files.write_json(target, {"step": 1})

    def torn(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(target, torn)
    assert target.read_text() == '{\n  "step": 1\n}\n'
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def model() -> torch.nn.Linear:
    return torch.nn.Linear(512, 1024)  # 2 MiB


def test_a_full_disk_keeps_the_old_checkpoint_and_is_named(model: torch.nn.Linear, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=3m") as disk:
        target = disk / "checkpoint_0001.pth"
        before = files.write_atomic(target, lambda file: torch.save(model.state_dict(), file))
        torch.nn.init.zeros_(model.weight)
        message = rf"disk full: {target} needs about 2\.0 MiB, has 1\.0 MiB free"
        with pytest.raises(EnvironmentProblem, match=message):
            files.write_atomic(target, lambda file: torch.save(model.state_dict(), file))
        assert (list(disk.iterdir()), files.sha256(target)) == ([target], before)
        assert torch.load(target, weights_only=True)["weight"].abs().max() > 0


def test_a_read_only_disk_keeps_the_old_checkpoint_and_is_named(model: torch.nn.Linear, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=9m") as disk:
        target = disk / "checkpoint_0001.pth"
        before = files.write_atomic(target, lambda file: torch.save(model.state_dict(), file))
        make_read_only(disk)
        for path in (target, disk / "new" / "checkpoint_0002.pth"):
            with pytest.raises(EnvironmentProblem, match=f"read-only file system: {path}"):
                files.write_atomic(path, lambda file: torch.save(model.state_dict(), file))
        assert (list(disk.iterdir()), files.sha256(target)) == ([target], before)


@pytest.mark.parametrize("content", ["text", "arrays", "weights"])
def test_the_hash_is_of_what_was_written_and_known_before_the_name(
    content: str, model: torch.nn.Linear, tmp_path: Path
) -> None:
    target, numbers = tmp_path / "folder" / "x", np.arange(100_000)

    def write(file: BinaryIO) -> None:
        if content == "text":
            file.write(b"abc")
        elif content == "arrays":
            np.savez(file, numbers=numbers)
        else:
            torch.save(model.state_dict(), file)

    def look(digest: str) -> None:
        seen.append(digest)
        (waiting,) = target.parent.iterdir()
        assert (waiting.suffix, files.sha256(waiting)) == (".tmp", digest)

    seen: list[str] = []
    assert [files.write_atomic(target, write, look)] == seen == [files.sha256(target)]
    if content == "arrays":
        assert np.array_equal(np.load(target)["numbers"], numbers)
    elif content == "weights":
        assert torch.equal(torch.load(target, weights_only=True)["weight"], model.weight)


def test_the_last_look_can_refuse(tmp_path: Path) -> None:
    def refuse(_: str) -> None:
        raise EnvironmentProblem("taken over")

    with pytest.raises(EnvironmentProblem, match="taken over"):
        files.write_atomic(tmp_path / "x", lambda file: file.write(b"abc"), refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "x", "abc")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_sha256_is_the_content_s(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    expected = subprocess.run(["sha256sum", tmp_path / "x"], capture_output=True, text=True, check=True)
    assert files.sha256(tmp_path / "x") == expected.stdout.split()[0]


def test_a_lock_keeps_another_process_out_and_ends_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from utils import files\n"
        "with files.lock(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=paths.ROOT
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError), files.lock(path, blocking=False):
        pass
    holder.kill()
    holder.wait()
    with files.lock(path, blocking=False):
        pass
