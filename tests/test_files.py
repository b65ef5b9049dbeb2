"""Atomic writes, locks and names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from utils import files, paths
from utils.errors import InputError


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


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "$(id)", "x" * 65, "a\nb"])
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
