"""Files below a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.errors import InputError
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


def test_folders_that_link_to_each_other_are_read_once_by_each_way_or_refused(tmp_path: Path) -> None:
    for here, there in (("a", "b"), ("b", "a")):
        (tmp_path / here).mkdir()
        (tmp_path / here / "1.PNG").touch()
        (tmp_path / here / "other").symlink_to(tmp_path / there)
    assert names(Folder(tmp_path)) == ["a/1.PNG", "a/other/1.PNG", "b/1.PNG", "b/other/1.PNG"]
    for number in range(6):
        (tmp_path / f"c{number}").mkdir()
    for number in range(6):
        for other in range(6):
            (tmp_path / f"c{number}" / f"to{other}").symlink_to(tmp_path / f"c{other}")
    with pytest.raises(InputError, match="in more than 16 ways; give a plain folder"):
        Folder(tmp_path)
