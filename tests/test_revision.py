"""Which commit a run says it is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from utils import revision


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision.commit() is None
    git(tmp_path, "init")
    assert revision.commit() is None, "nothing is committed yet"
    (tmp_path / "model.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-m", "", "v1")
    first = git(tmp_path, "rev-parse", "HEAD")
    assert revision.commit() == first and len(first) == 40
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("not tracked")
    assert revision.commit() == first
    (tmp_path / "model.py").write_text("2")
    assert revision.commit() == f"{first}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision.commit() is None, "no git here"
