"""Unpacking archives made by the real mksquashfs: whole, once, and never anything dangerous."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import pytest

from utils import squashfs
from utils.errors import EnvironmentProblem, InputError, RelayError
from utils.files import lock
from utils.squashfs_reader import Reader

ROOT = Path(__file__).resolve().parent.parent
LISTABLE = ("-noI", "-noF", "-noD")  # metadata and data as they are, so that a test can patch them

pytestmark = pytest.mark.skipif(not shutil.which("mksquashfs"), reason="needs squashfs-tools")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of content that squashfs stores in its own way."""
    folder = tmp_path_factory.mktemp("sample")
    noise = Random(0).randbytes(400_001)
    deep = folder / "labeled" / "a name with spaces" / "d\u00e9ep" / "new\nline"
    deep.mkdir(parents=True)
    (folder / "empty folder").mkdir()
    (folder / "empty").touch()
    (folder / "noise").write_bytes(noise)
    (folder / "text").write_bytes(b"0123456789abcdef" * 50_000 + b"tail")
    (folder / "one block").write_bytes(noise[: 1 << 17])
    (folder / "copy of one block").write_bytes(noise[: 1 << 17])
    with open(folder / "holes", "wb") as file:
        file.truncate(500_000)
        file.seek(300_000)
        file.write(b"x")
    os.link(folder / "noise", folder / "hard link")  # an extended inode
    for number in range(600):  # more than a directory header's 256 names, more than one metadata block
        (deep / f"{number}.yml").write_bytes(noise[: number % 97])
    (deep / "inner").symlink_to("../../../../noise")
    (folder / "labeled" / "sibling").symlink_to("a name with spaces")
    (folder / "noise").chmod(0o600)
    (folder / "labeled" / "a name with spaces").chmod(0o555)
    return folder


def pack(source: Path, archive: Path, *options: str) -> Path:
    command = ["mksquashfs", str(source), str(archive), *options, "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return archive


def snapshot(tree: Path) -> dict[str, tuple[object, ...]]:
    """Path -> kind, permissions and time of a file, content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in tree.rglob("*"):
        status, name = path.lstat(), str(path.relative_to(tree))
        if path.is_symlink():
            found[name] = ("symlink", os.readlink(path))
        elif path.is_dir():
            found[name] = ("directory",)
        elif name != squashfs.MARKER:
            found[name] = ("file", status.st_mode & 0o7777, int(status.st_mtime), path.read_bytes())
    return found


def read_all(archive: Path) -> dict[str, tuple[object, ...]]:
    """What the Python reader finds, in the words of `snapshot`."""
    found: dict[str, tuple[object, ...]] = {}
    with Reader(archive) as reader:
        for entry in reader.walk():
            if entry.kind == "file":
                content = b"".join(reader.read(entry))
                assert len(content) == entry.size
                found[entry.path] = ("file", entry.mode, entry.mtime, content)
            else:
                found[entry.path] = (entry.kind, entry.target) if entry.target else (entry.kind,)
    return found


def assert_nothing_left(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} <= {".sqsh", ".lock"}


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
    with lock(tmp_path / ".out.lock"):
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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
@pytest.mark.parametrize("options, reason", [("size=1m", "GiB free"), ("nr_inodes=200", "inodes free")])
def test_a_full_disk_is_seen_before(options: str, reason: str, sample: Path, tmp_path: Path) -> None:
    archive = pack(sample, tmp_path / "a.sqsh")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(EnvironmentProblem, match=reason):
            squashfs.unpack(archive, disk / "out")
        assert_nothing_left(disk)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("planted", ["empty folder", "folder", "file", "link", "other archive"])
def test_what_is_in_the_way_is_never_touched(planted: str, sample: Path, tmp_path: Path) -> None:
    archive, dest, mine = pack(sample, tmp_path / "a.sqsh"), tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "canary").write_text("alive")
    if planted == "file":
        dest.write_text("alive")
    elif planted == "link":
        dest.symlink_to(mine)
        (mine / squashfs.MARKER).write_text(json.dumps(squashfs._identity(archive)))
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


def test_stage_takes_an_archive_or_a_folder(sample: Path, tmp_path: Path) -> None:
    archive, root = pack(sample, tmp_path / "a.sqsh"), tmp_path / "scratch" / "relay"
    assert squashfs.stage(sample, root) == sample.resolve()
    assert not root.exists()
    staged = squashfs.stage(str(archive), root)
    assert staged.parent == root and staged.name.startswith("a-")
    assert root.stat().st_mode & 0o7777 == 0o700
    assert snapshot(staged) == snapshot(sample)
    assert squashfs.stage(archive, root) == staged
    pack(tmp_path / "scratch", archive)  # the same name, another content
    again = squashfs.stage(archive, root)
    assert again != staged and set(snapshot(again)) > {"relay", f"relay/{staged.name}"}


@pytest.mark.parametrize("root", ["link", "open", "file", "foreign", "below a file"])
def test_stage_refuses_a_root_others_could_have_planted(root: str, sample: Path, tmp_path: Path) -> None:
    archive, folder = pack(sample, tmp_path / "a.sqsh"), tmp_path / "root"
    if root == "link":
        folder.symlink_to(sample)
    elif root == "file":
        folder.touch()
    elif root == "below a file":
        folder = archive / "root"
    else:
        folder.mkdir()
        if root == "open":
            folder.chmod(0o777)
        elif os.geteuid():
            pytest.skip("needs root, to give a folder away")
        else:
            os.chown(folder, 65534, 65534)
    with pytest.raises(RelayError, match=f"staging folder {folder}"):
        squashfs.stage(archive, folder)


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.zip").write_bytes(b"PK" * 1000)
    with pytest.raises(InputError, match=r"labels\.zip: not a squashfs archive; give"):
        squashfs.stage(tmp_path / "labels.zip", tmp_path / "root")
    with pytest.raises(InputError, match=r"missing\.sqsh: not found; give"):
        squashfs.stage(tmp_path / "missing.sqsh", tmp_path / "root")
    command = [sys.executable, "-m", "utils.squashfs", str(tmp_path / "labels.zip"), str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.splitlines()[0][:9]) == (2, "ERROR 2: ")
