"""Files below a folder."""

from __future__ import annotations

from pathlib import Path

from utils.tree import Folder


def names(folder: Folder) -> list[str]:
    return [folder.name(number) for number in range(len(folder))]


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.JPEG").write_bytes(b"one")
    split = tmp_path / "set" / "training"
    split.mkdir(parents=True)
    (split / "images").symlink_to(tmp_path / "elsewhere")
    (split / "again").symlink_to(tmp_path / "set")
    folder = Folder(tmp_path / "set")
    assert names(folder) == ["training/images/1.JPEG"]
    assert folder.read(0) == b"one"
    assert names(Folder(tmp_path / "set", fingerprint="an archive's")) == []
