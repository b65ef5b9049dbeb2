"""The squashfs reader in Python: what it reads, and what no archive can make it do."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from random import Random

import pytest

from tests.archives import LISTABLE, NEEDS_TOOLS, make_sample, pack, read_all, snapshot
from utils.errors import InputError
from utils.squashfs_blocks import METADATA_BLOCK
from utils.squashfs_reader import Reader

pytestmark = NEEDS_TOOLS


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample(tmp_path_factory.mktemp("sample"))


@pytest.mark.parametrize(
    "options",
    ["-comp gzip", "-comp xz", "-comp lzma", "-comp lz4", "-comp zstd", "-noI -noF -noD", "-b 4096",
     "-no-fragments", "-always-use-fragments -b 1M -Xcompression-level 1", "-noI -nopad"],
)  # fmt: skip
def test_the_reader_reads_what_was_packed(options: str, sample: Path, tmp_path: Path) -> None:
    assert read_all(pack(sample, tmp_path / "a.sqsh", *options.split())) == snapshot(sample)


@pytest.mark.realdata
def test_the_reader_and_unsquashfs_agree_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    archive = shared_data / "bccd_labeled.sqsh"
    command = ["unsquashfs", "-n", "-d", str(tmp_path / "out"), str(archive)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    expected = snapshot(tmp_path / "out")
    assert len([found for found in expected.values() if found[0] == "file"]) == 2 * (205 + 87)
    assert read_all(archive) == expected


def test_a_folder_inside_itself_ends(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "child").mkdir(parents=True)
    (source / "child" / "file").touch()
    archive = pack(source, tmp_path / "a.sqsh", *LISTABLE)
    data = bytearray(archive.read_bytes())
    reference, inodes = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<Q", data, 64)[0]
    root = inodes + (reference >> 16) + 2 + (reference & 0xFFFF)
    child = root - 32  # both are basic directory inodes: let the child list what the root lists
    for field in (slice(16, 20), slice(24, 28)):
        data[child + field.start : child + field.stop] = data[root + field.start : root + field.stop]
    archive.write_bytes(data)
    with Reader(archive) as reader, pytest.raises(InputError, match="not a tree"):
        list(reader.walk())


def test_folders_that_share_a_listing_end(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(20):
        (source / f"{number:02}").mkdir(parents=True)
        (source / f"{number:02}" / "file").touch()
    (source / "large").mkdir()
    for number in range(1000):
        (source / "large" / f"{number}").touch()
    archive = pack(source, tmp_path / "a.sqsh", *LISTABLE)
    data = archive.read_bytes()
    with Reader(archive) as reader:
        folders = {entry.path: entry.where for entry in reader.walk() if entry.kind == "directory"}
    start, offset, size = folders.pop("large")
    for where in folders.values():  # a basic directory inode: start, links, size, offset
        old = struct.pack("<2I2H", where[0], 2, where[2], where[1])
        assert data.count(old) == 1
        data = data.replace(old, struct.pack("<2I2H", start, 2, size, offset))
    archive.write_bytes(data)
    with Reader(archive) as reader, pytest.raises(InputError, match="share their content"):
        list(reader.walk())


def test_a_position_far_outside_is_an_input_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"tail")
    archive = pack(source, tmp_path / "a.sqsh")
    data = bytearray(archive.read_bytes())
    data[80:88] = b"\xff" * 7 + b"\xef"  # the fragment table
    archive.write_bytes(data)
    with Reader(archive) as reader, pytest.raises(InputError, match="it points to byte"):
        list(reader.read(next(reader.walk())))


def test_random_damage_is_an_input_error(sample: Path, tmp_path: Path) -> None:
    archive = pack(sample, tmp_path / "a.sqsh", "-noI", "-comp", "lz4")
    good, random, refused = archive.read_bytes(), Random(0), 0
    inodes = struct.unpack_from("<Q", good, 64)[0]
    for _ in range(150):
        data = bytearray(good)
        for _ in range(3):
            position = random.choice([random.randrange(96), random.randrange(inodes, len(data))])
            data[position] = random.randrange(256)
        archive.write_bytes(data)
        try:
            with Reader(archive) as reader:
                for entry in reader.walk():
                    if entry.kind == "file":
                        next(reader.read(entry), b"")
        except InputError as error:
            assert str(error).startswith(str(archive))
            refused += 1
    assert refused > 50


def test_a_path_that_no_system_call_takes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    names = ["d" * 250] * 17
    folders = [f"{'/'.join(names[:depth])} d 755 0 0" for depth in range(1, len(names) + 1)]
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh", *(word for folder in folders for word in ("-p", folder)))
    with Reader(archive) as reader, pytest.raises(InputError, match="a path of 4266 characters"):
        list(reader.walk())


@pytest.mark.parametrize("content, options", [(b"x" * 3000, ("-no-fragments",)), (b"x" * 100, ())])
def test_a_block_that_is_stored_larger_than_any_block_is_refused(
    content: bytes, options: tuple[str, ...], tmp_path: Path
) -> None:
    """Else it would be read into memory before anything else is looked at."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(content)
    (tmp_path / "source" / "room").write_bytes(Random(0).randbytes(22 * 4096))
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh", *LISTABLE, "-b", "4096", *options)
    stored = 1 << 24  # as it is, not compressed
    old = struct.pack("<I", len(content) | stored)
    data = archive.read_bytes()
    assert data.count(old) == 1
    archive.write_bytes(data.replace(old, struct.pack("<I", 70_000 | stored)))
    with Reader(archive) as reader, pytest.raises(InputError, match="a block of 70000 bytes at byte"):
        for entry in reader.walk():
            list(reader.read(entry))


def test_an_empty_archive_is_whole(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    assert read_all(pack(tmp_path / "source", tmp_path / "a.sqsh")) == {}


def test_a_listing_that_begins_with_half_a_name_in_its_block_is_whole(tmp_path: Path) -> None:
    """The block it begins in shows no name of it, and more than one block's worth of it follows."""
    source = tmp_path / "source"
    first = source / ("a" * 255)
    first.mkdir(parents=True)
    for name in [*(f"{number:02}".ljust(255, "x") for number in range(30)), "last".ljust(24, "x")]:
        (first / name).touch()
    for number in range(31):
        (source / f"b{number:02}".ljust(255, "x")).touch()
    archive = pack(source, tmp_path / "a.sqsh", *LISTABLE)
    with Reader(archive) as reader:
        found = list(reader.walk())
        _, offset, listing = reader._inode(reader._blocks.root, "").where
    assert offset + 12 + 8 + 255 > METADATA_BLOCK < listing - 3  # or this tests nothing
    assert len(found) == 1 + 31 + 31


def test_a_listing_may_be_many_times_its_stored_size(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3000):
        (source / f"{number:04}".ljust(200, "x")).touch()
    archive = pack(source, tmp_path / "a.sqsh")
    assert archive.stat().st_size * 5 < 3000 * 208
    assert len(read_all(archive)) == 3000
