"""Reading files straight from an archive: the same numbers, names and content as in the folder unpacked from it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from tests.archives import LISTABLE, NEEDS_TOOLS, make_lengths, make_sample, pack, read_one
from utils import array_file, squashfs_index
from utils.archive import Archive
from utils.errors import InputError
from utils.squashfs_codecs import METHODS, decompressor
from utils.squashfs_source import File
from utils.tree import LARGEST, NO_FILE, TOO_LARGE, Folder, Tree

pytestmark = NEEDS_TOOLS
DIGEST = "0" * 64


def opened(archive: Path) -> Archive:
    return Archive(archive, DIGEST, archive.with_suffix(".index"))


def unpacked(archive: Path) -> Folder:
    """What `unsquashfs`, which is not ours, makes of it."""
    dest = archive.with_suffix(".unpacked")
    subprocess.run(["unsquashfs", "-n", "-d", str(dest), str(archive)], check=True, stdout=subprocess.DEVNULL)
    return Folder(dest, fingerprint=DIGEST)


def assert_same(ours: Tree, theirs: Tree) -> None:
    assert [ours.name(number) for number in range(len(ours))] == [theirs.name(number) for number in range(len(theirs))]
    assert ours.find().tolist() == theirs.find().tolist()
    for number in range(len(ours)):
        assert ours.problem(number) == theirs.problem(number), ours.name(number)
        if ours.problem(number) is None:
            assert ours.stamp(number) == theirs.stamp(number), ours.name(number)
            assert ours.read(number) == theirs.read(number), ours.name(number)


@pytest.mark.parametrize(
    "block, options",
    [
        (4096, "-comp gzip"),
        (4096, "-comp zstd -always-use-fragments"),
        (4096, "-comp lz4 -no-fragments -noI"),
        (8192, "-comp xz -noI -noF"),
        (65536, "-comp lzma"),
        (131072, "-comp zstd -Xcompression-level 1"),
        (131072, "-noI -noD -noF"),
        (131072, "-comp lz4 -Xhc -always-use-fragments -noF"),
        (131072, "-comp gzip -Xcompression-level 1 -no-fragments -noD"),
        (1048576, "-comp zstd -Xcompression-level 1 -no-fragments"),
        (1048576, "-comp lz4 -always-use-fragments"),
    ],
)
def test_every_file_is_as_unsquashfs_writes_it(block: int, options: str, tmp_path: Path) -> None:
    source = make_lengths(tmp_path / "source", block)
    archive = pack(source, tmp_path / "a.sqsh", "-b", str(block), *options.split())
    assert_same(opened(archive), unpacked(archive))


def test_names_of_all_kinds_and_many_folders(tmp_path: Path) -> None:
    source = make_sample(tmp_path / "source")
    for number in range(300):
        (source / f"folder {number % 20}" / str(number)).mkdir(parents=True)
        (source / f"folder {number % 20}" / str(number) / "file").write_text(str(number))
    for name in (b"\xff is not utf-8", "\U0001f600".encode(), b"a.b", b"a-b", b".hidden"):
        Path(os.fsdecode(bytes(source) + b"/" + name)).write_bytes(name)
    archive = pack(source, tmp_path / "a.sqsh")
    ours, theirs = opened(archive), unpacked(archive)
    assert_same(ours, theirs)
    for arguments in ({"folder": "folder 1"}, {"folder": "folder 1", "deep": False}, {"suffixes": (".yml", "b")}):
        assert ours.find(**arguments).tolist() == theirs.find(**arguments).tolist()
    assert len(ours.find("folder 1")) == 15


def test_links_lead_to_the_files_that_they_lead_to_on_disk(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "file").write_text("content")
    for place, target in {
        "file": "a/b/file", "a/up": "../file", "a/folder": "b", "through": "a/folder/file", "a/b/far": "../../a/up",
        "dots": "./a/./b//file", "slash": "a/b/file/", "on": "a/b/file/.", "under": "a/b/file/x", "none": "nothing",
        "self": "self", "one": "two", "two": "one", "here": ".", "folder": "a/folder/",
    }.items():  # fmt: skip
        (source / place).symlink_to(target)
    previous = "a/b/file"
    for number in range(45):  # Linux follows 40
        (source / f"chain {number:02}").symlink_to(previous)
        previous = f"chain {number:02}"
    archive = pack(source, tmp_path / "a.sqsh")
    ours, theirs = opened(archive), unpacked(archive)
    assert_same(ours, theirs)
    problems = {ours.name(number): ours.problem(number) for number in range(len(ours))}
    assert {problems["through"], problems["chain 39"]} == {None}
    assert {problems["chain 40"], problems["slash"], problems["self"]} == {NO_FILE}
    assert "here" not in problems and "folder" not in problems
    with pytest.raises(InputError, match=f"a.sqsh/none: {NO_FILE}"):
        ours.read(sorted(problems).index("none"))


def test_an_empty_archive_has_no_files(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh")
    assert len(opened(archive)) == 0 and opened(archive).find().tolist() == []
    assert len(opened(archive)) == 0  # from its index


def test_the_same_archive_has_one_name_for_a_file_in_messages(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    archive = pack(tmp_path / "source", tmp_path / "copy.sqsh")
    tree = Archive(archive, DIGEST, tmp_path / "a.index", Path("/far/away.sqsh"))
    assert (str(tree), tree.shown(0), tree.read(0)) == ("/far/away.sqsh", "/far/away.sqsh/file", b"x")


def test_a_file_that_is_too_large_to_be_an_image_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(bytes(3_000_000))
    os.link(tmp_path / "source" / "a", tmp_path / "source" / "b")  # gives an inode with a 64-bit size
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh", *LISTABLE)
    data, size = archive.read_bytes(), struct.pack("<Q", 3_000_000)
    assert data.count(size) == 1
    archive.write_bytes(data.replace(size, struct.pack("<Q", LARGEST + 1)))
    os.truncate(tmp_path / "source" / "a", LARGEST + 1)
    for tree in (opened(archive), Folder(tmp_path / "source")):
        assert (tree.problem(1), tree.stamp(1)[0]) == (TOO_LARGE, LARGEST + 1)
        with pytest.raises(InputError, match=f"b: {TOO_LARGE}"):
            tree.read(1)


@pytest.mark.parametrize(
    "options, content, reason",
    [
        ("-comp gzip -no-fragments", b"1234567" * 2000, "the block at byte"),
        ("-comp zstd -no-fragments", b"1234567" * 2000, "damaged zstd block"),
        ("-comp lz4", b"1234567" * 300, "damaged lz4 block"),
        ("-comp xz", b"1234567" * 300, "the block at byte"),
    ],
)
def test_a_bad_block_names_the_archive_and_the_file(options: str, content: bytes, reason: str, tmp_path: Path) -> None:
    source, archive = tmp_path / "source", tmp_path / "a.sqsh"
    source.mkdir()
    (source / "bad.png").write_bytes(content)
    (source / "good.png").write_bytes(Random(0).randbytes(3 * 4096))
    pack(source, archive, "-b", "4096", *options.split(), "-noI")
    tree = opened(archive)
    data = bytearray(archive.read_bytes())
    status = archive.stat()
    begin = data.index((source / "good.png").read_bytes())
    place = begin - 40 if "-no-fragments" in options else begin + 3 * 4096  # its last block, or the fragment
    data[place : place + 40] = b"\xa5" * 40
    archive.write_bytes(data)
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError, match=rf"{archive}: damaged squashfs archive: the file 'bad\.png': .*({reason})"):
        tree.read(0)
    assert tree.read(1) == (source / "good.png").read_bytes()


@pytest.mark.parametrize("method", ["gzip", "lzma", "xz", "lz4", "zstd"])
def test_a_block_gives_what_is_in_it_and_never_more_than_it_may(method: str, tmp_path: Path) -> None:
    """Not what happened to be in memory behind a short one, which would be accepted as the rest of an image."""
    content = b"1234567" * 400
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(content)
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh", "-comp", method, "-no-fragments", "-b", "4096")
    index = squashfs_index.build(archive)
    start, stored = int(index.rows[0, 2]), int(index.sizes[0])
    data = archive.read_bytes()[start : start + stored]
    decompress = decompressor(next(number for number, name in METHODS.items() if name == method))
    for limit in (len(content), len(content) + 1, 4096):
        assert decompress(data, limit) == content
    for damaged, limit in ((data, len(content) - 1), (data[:-4], 4096), (data[:5], 4096)):
        with pytest.raises(ValueError):
            decompress(damaged, limit)


@pytest.mark.parametrize(
    "options, old, new, reason",
    [
        ("-comp zstd -no-fragments", 5000, 5100, "a block of 5000 bytes instead of 5100"),
        ("-comp zstd -no-fragments", 5000, 4900, "damaged zstd block"),
        ("-comp zstd -noF", 5000, 5100, "its end is missing"),
    ],
)
def test_a_file_that_claims_another_length_is_refused(
    options: str, old: int, new: int, reason: str, tmp_path: Path
) -> None:
    """Else it would be read on into what belongs to others."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"12345" * (old // 5))
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh", "-b", "8192", "-noI", *options.split())
    data = archive.read_bytes()
    place = data.rindex(struct.pack("<I", old), 0, struct.unpack_from("<Q", data, 72)[0])  # the inode's
    archive.write_bytes(data[:place] + struct.pack("<I", new) + data[place + 4 :])
    tree = opened(archive)
    with pytest.raises(InputError, match=f"the file 'file': .*{reason}"):
        tree.read(0)


def test_an_archive_that_was_exchanged_is_not_read_by_the_old_index(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh")
    tree = opened(archive)
    (tmp_path / "source" / "file").write_text("y")
    pack(tmp_path / "source", archive)
    os.utime(archive, (1, 1))
    with pytest.raises(InputError, match="changed while it was in use"):
        tree.read(0)


@pytest.mark.parametrize(
    "pseudo, reason",
    [("bad c 666 0 0 1 3", "a character device"), ("bad f 4755 0 0 echo", "setuid"), ("bad s 777 0 0 ../x", "a link")],
)
def test_dangerous_entries_are_refused(pseudo: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh", "-p", pseudo)
    with pytest.raises(InputError, match=rf"a\.sqsh: 'bad' is {reason}"):
        opened(archive)


class Contents(Dataset[bytes]):
    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def __len__(self) -> int:
        return len(self.tree)

    def __getitem__(self, number: int) -> bytes:
        return self.tree.read(number)


def whole(batch: list[bytes]) -> list[bytes]:
    return batch


def test_loader_processes_read_at_once(tmp_path: Path) -> None:
    source = make_lengths(tmp_path / "source", 4096)
    tree = opened(pack(source, tmp_path / "a.sqsh", "-b", "4096", "-comp", "zstd"))
    readable = [number for number in range(len(tree)) if tree.problem(number) is None]
    expected = [tree.read(number) for number in readable]  # this process has it open when it forks
    loader = DataLoader(
        Contents(tree), sampler=readable * 3, batch_size=5, num_workers=2, collate_fn=whole,
        multiprocessing_context="fork",
    )  # fmt: skip
    assert [content for batch in loader for content in batch] == expected * 3
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(functools.partial(read_one, tree), readable * 3, chunksize=5) == expected * 3


def descriptors(tree: Archive) -> None:
    """Ends with code 0 if a fork reads by a file that it opened for itself."""
    before = tree._opened
    tree.read(0)
    assert before and tree._opened
    ours, theirs = tree._opened[1].file, before[1].file
    assert isinstance(ours, File) and isinstance(theirs, File) and ours.descriptor != theirs.descriptor


def test_a_fork_opens_the_file_for_itself(tmp_path: Path) -> None:
    """Processes that share one open file also share what the system knows about the order of its reads."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    tree = opened(pack(tmp_path / "source", tmp_path / "a.sqsh"))
    tree.read(0)
    child = multiprocessing.get_context("fork").Process(target=descriptors, args=(tree,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert len(pickle.dumps(tree)) < 1000  # no index, no open file


def saved(cache: Path) -> dict[str, np.ndarray]:
    arrays = array_file.load(cache, f"{squashfs_index.FORMAT} {DIGEST}")
    assert arrays
    return arrays


def old_format(cache: Path) -> None:
    array_file.save(cache, f"0 {DIGEST}", {}, saved(cache))


def others_may_write(cache: Path) -> None:
    cache.chmod(0o664)


def link(cache: Path) -> None:
    cache.symlink_to(cache.rename(cache.with_name("planted")))


def pickled(cache: Path) -> None:
    arrays = saved(cache) | {"names": np.array([descriptors])}
    array_file.save(cache, f"{squashfs_index.FORMAT} {DIGEST}", {}, arrays)


def cut(cache: Path) -> None:
    os.truncate(cache, cache.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [old_format, others_may_write, link, pickled, cut])
def test_an_index_that_will_not_do_is_made_again(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    source = make_lengths(tmp_path / "source", 4096)
    archive = pack(source, tmp_path / "a.sqsh")
    cache = archive.with_suffix(".index")
    assert_same(opened(archive), unpacked(archive))
    spoil(cache)
    before = cache.lstat().st_ino
    assert_same(opened(archive), Folder(archive.with_suffix(".unpacked"), fingerprint=DIGEST))
    assert cache.lstat().st_ino != before and cache.lstat().st_mode & 0o170022 == 0o100000


def test_the_index_is_loaded_and_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh")
    opened(archive)
    before = archive.with_suffix(".index").stat()
    opened(archive)
    after = archive.with_suffix(".index").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    Archive(archive, "1" * 64, archive.with_suffix(".index"))  # another archive's
    assert archive.with_suffix(".index").stat().st_ino != before.st_ino


def test_no_flipped_bit_of_the_index_does_harm(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("content")
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh")
    cache, random = archive.with_suffix(".index"), Random(0)
    opened(archive)
    good = cache.read_bytes()
    for _ in range(100):
        data = bytearray(good)
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        cache.write_bytes(data)
        index = squashfs_index.load(archive, DIGEST, cache)
        assert (index.names.tobytes(), index.rows.shape) == (b"file", (1, squashfs_index.COLUMNS))


def test_links_that_lead_on_and_on_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("x")
    for number in range(30):
        (source / f"l{number}").symlink_to("./" * 100 + (f"l{number + 1}" if number < 29 else "file"))
    archive = pack(source, tmp_path / "a.sqsh")
    assert opened(archive).read(1) == b"x"
    monkeypatch.setattr(squashfs_index, "MOST_STEPS", 10_000)
    with pytest.raises(InputError, match="its links lead on and on"):
        squashfs_index.build(archive)


def test_a_bad_block_is_bad_input_from_a_loader_process_too(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"abc" * 50_000)
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh", "-comp", "xz", "-no-fragments")
    tree = opened(archive)
    data = bytearray(archive.read_bytes())
    data[96:104] = bytes(8)  # the first block, behind the superblock
    stamp = archive.stat()
    archive.write_bytes(data)
    os.utime(archive, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(InputError, match="damaged squashfs archive: the file 'file'"):
        list(DataLoader(Contents(tree), num_workers=1))


def test_a_spawned_process_refuses_an_archive_that_was_exchanged(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("one")
    archive = pack(tmp_path / "source", tmp_path / "a.sqsh")
    sent = pickle.dumps(opened(archive))
    os.utime(archive, ns=(0, 0))
    with pytest.raises(InputError, match="changed while it was in use"):
        pickle.loads(sent).read(0)
