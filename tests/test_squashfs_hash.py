"""Which archive it was: known hashes, compared whenever there is one."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.archives import NEEDS_TOOLS, pack
from utils import files, squashfs, squashfs_hash
from utils.errors import InputError
from utils.tree import Folder, Tree

pytestmark = NEEDS_TOOLS
Stager = Callable[[Path, Path, Path], Tree]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """One with data that is stored as it is, which no checksum of squashfs protects."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "noise").write_bytes(Random(0).randbytes(300_000))
    return pack(source, tmp_path / "a.sqsh")


@pytest.fixture(params=["direct", "unpack"])
def stage(request: pytest.FixtureRequest) -> Stager:
    return functools.partial(squashfs.stage, how=request.param)


def flip(archive: Path) -> None:
    """Change one bit and nothing that a listing of the folder shows."""
    status, data = archive.stat(), bytearray(archive.read_bytes())
    data[100_000] ^= 1
    archive.write_bytes(data)
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_first_use_is_written_down_as_sha256sum_does(archive: Path, tmp_path: Path, stage: Stager) -> None:
    root, records = tmp_path / "node1", tmp_path / "archives"
    staged = stage(archive, root, records)
    assert staged.fingerprint == files.sha256(archive)
    (record,) = records.iterdir()
    subprocess.run(["sha256sum", "--check", "--strict", record], check=True)
    before = record.stat().st_mtime_ns
    assert stage(archive, tmp_path / "node2", records).fingerprint == staged.fingerprint
    assert record.stat().st_mtime_ns == before


def test_an_archive_that_changed_since_is_refused_on_another_node(archive: Path, tmp_path: Path, stage: Stager) -> None:
    node1, node2, records = tmp_path / "node1", tmp_path / "node2", tmp_path / "archives"
    staged, good = stage(archive, node1, records), files.sha256(archive)
    flip(archive)
    (record,) = records.iterdir()
    message = f"{archive}: not the archive this chain began with: its sha256 is {files.sha256(archive)}, was {good}; .*"
    with pytest.raises(InputError, match=f"{message} --name, or remove {record} to accept the change"):
        stage(archive, node2, records)
    assert [path.suffix for path in node2.iterdir()] == [".lock"]
    assert str(stage(archive, node1, records)) == str(staged)  # staged before; not hashed again
    assert staged.fingerprint == good
    record.unlink()
    assert stage(archive, node2, records).fingerprint == files.sha256(archive)
    with pytest.raises(
        InputError, match=f"{archive}: not the archive"
    ):  # another chain's copy of this node is no excuse
        stage(archive, node1, records)


def test_a_hash_beside_the_archive_is_compared(archive: Path, tmp_path: Path) -> None:
    beside = tmp_path / "a.sqsh.sha256"
    beside.write_text(f"{files.sha256(archive).upper()} *some/where/a.sqsh\n")
    squashfs.unpack(archive, tmp_path / "out")
    flip(archive)
    with pytest.raises(InputError, match=rf"{archive}: damaged or exchanged: .* {beside} says [0-9a-f]+; copy"):
        squashfs.unpack(archive, tmp_path / "again")
    beside.write_text("see the wiki\n")
    with pytest.raises(InputError, match=f"{beside}: does not begin with a sha256"):
        squashfs.unpack(archive, tmp_path / "again")


def test_the_first_of_two_nodes_wins(archive: Path, tmp_path: Path) -> None:
    record = tmp_path / "archives" / "a.sha256"
    squashfs_hash.settle(archive, "a" * 64, record)
    squashfs_hash.settle(archive, "a" * 64, record)
    with pytest.raises(InputError, match="not the archive this chain began with"):
        squashfs_hash.settle(archive, "b" * 64, record)
    assert [path.name for path in record.parent.iterdir()] == ["a.sha256"]
    assert record.read_text() == f"{'a' * 64}  {archive}\n"


def test_a_refused_archive_is_not_written_down(tmp_path: Path, stage: Stager) -> None:
    (tmp_path / "source").mkdir()
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh", "-p", "bad f 4755 0 0 echo")
    with pytest.raises(InputError, match="setuid"):
        stage(archive, tmp_path / "node1", tmp_path / "archives")
    assert not (tmp_path / "archives").exists()


def test_a_folder_s_fingerprint_is_of_names_and_sizes(archive: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "in").mkdir()
    (source / "in" / "x").write_text("abc")
    (source / "in" / "link").symlink_to("nowhere")
    seen = [Folder(source).fingerprint]
    assert Folder(shutil.copytree(source, tmp_path / "copy", symlinks=True)).fingerprint == seen[0]
    (source / "in" / "x").write_text("abcd")
    seen.append(Folder(source).fingerprint)
    (source / "in" / "x").rename(source / "x")
    seen.append(Folder(source).fingerprint)
    (source / "x").unlink()
    seen.append(Folder(source).fingerprint)
    assert len(set(seen)) == 4
