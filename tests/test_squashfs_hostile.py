"""Archives that are damaged or mean harm, and disks and folders that will not do."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.archives import LISTABLE, NEEDS_TOOLS, assert_nothing_left, make_sample, pack, snapshot, unpack
from tests.disks import mounted
from utils import squashfs
from utils.errors import EnvironmentProblem, InputError
from utils.squashfs_once import identity

pytestmark = NEEDS_TOOLS


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample(tmp_path_factory.mktemp("sample"))


def test_a_cut_archive_is_refused_with_both_numbers(sample: Path, tmp_path: Path) -> None:
    archive = pack(sample, tmp_path / "a.sqsh")
    used = struct.unpack_from("<Q", archive.read_bytes(), 40)[0]
    os.truncate(archive, used)
    squashfs.unpack(archive, tmp_path / "without padding")
    os.truncate(archive, used - 1)
    with pytest.raises(InputError, match=f"a.sqsh: cut short: {used - 1} bytes of {used}"):
        squashfs.unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path, reason",
    [
        (os.environ["PATH"], "unsquashfs ended with 1: .*fail"),
        ("/nonexistent", "damaged .* block at byte"),
    ],
)
def test_damaged_data_leaves_nothing(path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "text").write_bytes(b"".join(b"%d\n" % number for number in range(200_000)))
    archives = tmp_path / "archives"
    archives.mkdir()
    archive = pack(source, archives / "a.sqsh")
    data = bytearray(archive.read_bytes())
    data[5000:6000] = bytes(1000)
    archive.write_bytes(data)
    monkeypatch.setenv("PATH", path)
    with pytest.raises(InputError, match=rf"a\.sqsh: {reason}"):
        squashfs.unpack(archive, archives / "out")
    assert_nothing_left(archives)


@pytest.mark.parametrize(
    "pseudo, reason",
    [
        ("bad c 666 0 0 1 3", "a character device"),
        ("bad b 666 0 0 1 3", "a block device"),
        ("bad i 666 0 0 f", "a fifo"),
        ("bad i 666 0 0 s", "a socket"),
        ("bad f 4755 0 0 echo", "setuid"),
        ("bad f 2755 0 0 echo", "setuid or setgid"),
        ("bad s 777 0 0 /etc/passwd", "a link that leaves"),
        ("bad s 777 0 0 ../canary", "a link that leaves"),
        ("in/bad s 777 0 0 ../../canary", "a link that leaves"),
        ("in/bad s 777 0 0 ./deep/../canary", "a link that leaves"),
    ],
)
def test_dangerous_entries_are_refused(pseudo: str, reason: str, tmp_path: Path) -> None:
    source = tmp_path / "source.sqsh"
    (source / "in" / "deep").mkdir(parents=True)
    archive = pack(source, tmp_path / "a.sqsh", "-p", pseudo)
    with pytest.raises(InputError, match=rf"a\.sqsh: '(in/)?bad' is {reason}"):
        squashfs.unpack(archive, tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("name, crafted", [("xyz", b"aaa"), ("zz", b".."), ("xyz", b"a/a"), ("xyz", b"a\0a")])
def test_crafted_names_are_refused(name: str, crafted: bytes, tmp_path: Path) -> None:
    source = tmp_path / "source.sqsh"
    source.mkdir()
    (source / "aaa").symlink_to("b")
    (source / name).touch()
    archive = pack(source, tmp_path / "a.sqsh", *LISTABLE)
    data = archive.read_bytes()
    assert data.count(name.encode()) == 1
    archive.write_bytes(data.replace(name.encode(), crafted))
    with pytest.raises(InputError, match=r"a\.sqsh: damaged squashfs archive: the directory entry"):
        squashfs.unpack(archive, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_a_bomb_is_refused_with_both_numbers(tmp_path: Path) -> None:
    source = tmp_path / "source.sqsh"
    source.mkdir()
    (source / "a").write_bytes(bytes(3_000_000))
    os.link(source / "a", source / "b")  # gives an inode with a 64-bit size
    archive = pack(source, tmp_path / "a.sqsh", *LISTABLE)
    data = archive.read_bytes()
    size = struct.pack("<Q", 3_000_000)
    assert data.count(size) == 1
    archive.write_bytes(data.replace(size, struct.pack("<Q", 1 << 50)))
    with pytest.raises(EnvironmentProblem, match=r"a\.sqsh needs 2139095\.04 GiB unpacked, .* has [\d.]+ G"):
        squashfs.unpack(archive, tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("options, reason", [("size=1m", "GiB free"), ("nr_inodes=200", "inodes free")])
def test_a_full_disk_is_seen_before(options: str, reason: str, sample: Path, tmp_path: Path) -> None:
    archive = pack(sample, tmp_path / "a.sqsh")
    with mounted(tmp_path / "disk", options) as disk:
        with pytest.raises(EnvironmentProblem, match=reason):
            squashfs.unpack(archive, disk / "out")
        assert_nothing_left(disk)


@pytest.mark.parametrize("planted", ["empty folder", "folder", "file", "link", "other archive"])
def test_what_is_in_the_way_is_never_touched(planted: str, sample: Path, tmp_path: Path) -> None:
    archive, dest, mine = pack(sample, tmp_path / "a.sqsh"), tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "canary").write_text("alive")
    if planted == "file":
        dest.write_text("alive")
    elif planted == "link":
        dest.symlink_to(mine)
        (mine / squashfs.MARKER).write_text(json.dumps(identity(archive) | {"sha256": "0" * 64}))
    elif planted == "other archive":
        squashfs.unpack(pack(mine, tmp_path / "b.sqsh"), dest)
    else:
        dest.mkdir()
        if planted == "folder":
            (dest / "canary").write_text("alive")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"{dest} (exists and was not unpacked here|holds another archive)"):
        squashfs.unpack(archive, dest)
    after = snapshot(tmp_path)
    assert {name: found for name, found in after.items() if not name.endswith(".lock")} == {
        name: found for name, found in before.items() if not name.endswith(".lock")
    }


def test_stage_refuses_a_root_others_could_have_planted(sample: Path, tmp_path: Path) -> None:
    archive, root = pack(sample, tmp_path / "a.sqsh"), tmp_path / "root"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(EnvironmentProblem, match=f"{root}: others can write there"):
        squashfs.stage(archive, root)


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.zip").write_bytes(b"PK" * 1000)
    with pytest.raises(InputError, match=r"labels\.zip: not a squashfs archive; give"):
        squashfs.stage(tmp_path / "labels.zip", tmp_path / "root")
    with pytest.raises(InputError, match=r"missing\.sqsh: not found; give"):
        squashfs.stage(tmp_path / "missing.sqsh", tmp_path / "root")
    ended = unpack(tmp_path / "labels.zip", tmp_path / "out")
    assert (ended.returncode, ended.stderr.splitlines()[0][:9]) == (2, "ERROR 2: ")


def device(source: Path, archive: Path) -> None:
    pack(source, archive, "-p", "bad c 666 0 0 1 3")


def setuid(source: Path, archive: Path) -> None:
    pack(source, archive, "-p", "bad f 4755 0 0 echo")


def leaving_link(source: Path, archive: Path) -> None:
    pack(source, archive, "-p", f"bad s 777 0 0 {source.parent}")


def dots(source: Path, archive: Path) -> None:
    """`../canary` as the name of a file."""
    (source / "xxxcanary").write_text("dead")
    data = pack(source, archive, *LISTABLE).read_bytes()
    archive.write_bytes(data.replace(b"xxxcanary", b"../canary"))


def bomb(source: Path, archive: Path) -> None:
    """A few kilobytes that claim two files of 10 GiB."""
    (source / "a").write_bytes(bytes(3_000_000))
    os.link(source / "a", source / "b")  # gives an inode with a 64-bit size
    data = pack(source, archive, *LISTABLE).read_bytes()
    archive.write_bytes(data.replace(struct.pack("<Q", 3_000_000), struct.pack("<Q", 10 << 30)))


def cut(source: Path, archive: Path) -> None:
    (source / "noise").write_bytes(Random(0).randbytes(300_000))
    os.truncate(pack(source, archive), 200_000)


def flipped(source: Path, archive: Path) -> None:
    """Where no checksum of the archive sees it; but its sha256 is known."""
    (source / "noise").write_bytes(Random(0).randbytes(300_000))
    data = bytearray(pack(source, archive).read_bytes())
    archive.with_name("a.sqsh.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  a.sqsh\n")
    data[100_000] ^= 1
    archive.write_bytes(data)


def planted(source: Path, archive: Path) -> None:
    """The target is a link to where something could be written through it."""
    pack(source, archive)
    archive.with_name("disk").joinpath("out").symlink_to(source.parent / "elsewhere")


@pytest.mark.parametrize("path", [os.environ["PATH"], "/nonexistent"], ids=["unsquashfs", "python"])
@pytest.mark.parametrize(
    "build, code, reason",
    [
        (device, 2, "'bad' is a character device"),
        (setuid, 2, "'bad' is setuid"),
        (leaving_link, 2, "'bad' is a link that leaves the archive"),
        (dots, 2, "the directory entry '../canary'"),
        (bomb, 75, "needs 20.40 GiB unpacked"),
        (cut, 2, "cut short"),
        (flipped, 2, "damaged or exchanged"),
        (planted, 2, "exists and was not unpacked here"),
    ],
)
def test_a_hostile_archive_writes_nothing_anywhere(
    build: Callable[[Path, Path], None], code: int, reason: str, path: str, tmp_path: Path
) -> None:
    source, archive = tmp_path / "source", tmp_path / "a.sqsh"
    for folder in (source, tmp_path / "elsewhere"):
        folder.mkdir()
        (folder / "canary").write_text("alive")
    with mounted(tmp_path / "disk", "size=50m") as disk:
        (disk / "canary").write_text("alive")
        build(source, archive)
        before = snapshot(tmp_path)
        ended = unpack(archive, disk / "out", PATH=path)
        assert ended.returncode == code, ended.stderr
        assert ended.stderr.splitlines()[-1].startswith(f"ERROR {code}: ") and reason in ended.stderr
        after = snapshot(tmp_path)
        assert {name: found for name, found in after.items() if name != "disk/.out.lock"} == before


def test_a_flipped_byte_is_not_seen_without_a_known_hash(tmp_path: Path) -> None:
    """What the known hash is for."""
    source, archive = tmp_path / "source", tmp_path / "a.sqsh"
    source.mkdir()
    flipped(source, archive)
    archive.with_name("a.sqsh.sha256").unlink()
    assert unpack(archive, tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "noise").read_bytes() != (source / "noise").read_bytes()
