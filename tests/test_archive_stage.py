"""Where an archive is read from: in place, from a copy, unpacked or mounted; always the same files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.archives import NEEDS_TOOLS, make_lengths, pack
from tests.disks import mounted
from tests.test_ssl_train import pretrain, records, write_images
from utils import files, squashfs, squashfs_direct
from utils.archive import Archive
from utils.errors import InputError
from utils.paths import ROOT
from utils.shared_config import Stage
from utils.squashfs_direct import file_system, should_copy
from utils.tree import Tree

pytestmark = NEEDS_TOOLS
MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:26 / /tmp rw shared:2 - tmpfs tmpfs rw
31 22 0:40 / /project rw - lustre 10.0.0.1@o2ib:/fs rw
32 22 0:41 / /home rw shared:3 master:1 - nfs4 server:/home rw,vers=4.2
33 32 0:42 / /home/me/my\040data rw - fuse.sshfs me@host: rw
34 31 0:43 / /project/disk rw - xfs /dev/sdb rw
35 22 0:44 / /over rw - autofs systemd-1 rw
36 35 0:45 / /over rw - nfs server:/over rw
37 22 0:46 / /usb rw - fuseblk /dev/sdc rw
"""


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/data/a.sqsh", "ext4"), ("/tmp/a.sqsh", "tmpfs"), ("/tmpfile", "ext4"), ("/project/x/a.sqsh", "lustre"),
        ("/home/me/a.sqsh", "nfs4"), ("/home/me/my data/a.sqsh", "fuse.sshfs"), ("/project/disk/a.sqsh", "xfs"),
        ("/over/a.sqsh", "nfs"), ("/usb/a.sqsh", "fuseblk"),
    ],
)  # fmt: skip
def test_the_file_system_of_a_path_is_that_of_the_nearest_mount(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind
    assert file_system(Path(path), "") == "an unknown file system"


@pytest.mark.parametrize(
    "archive, root, disk, size, is_copied, why",
    [
        ("/project/a.sqsh", "/tmp/relay", "/tmp", 10, True, "on lustre"),
        ("/home/me/my data/a.sqsh", "/tmp/relay", "/tmp", 10, True, "on fuse.sshfs"),
        ("/project/a.sqsh", "/tmp/relay", "/tmp", 2 << 30, False, "needs 2.00 GiB of 1.00 GiB free on /tmp/relay"),
        ("/project/a.sqsh", "/runs/staged", None, 10, False, "neither SLURM_TMPDIR nor RELAY_SCRATCH"),
        ("/project/a.sqsh", "/runs/staged", "/tmp", 10, False, "neither SLURM_TMPDIR nor RELAY_SCRATCH"),
        ("/home/a.sqsh", "/project/me/relay", "/project/me", 10, False, "so is /project/me/relay, on lustre"),
        ("/data/a.sqsh", "/tmp/relay", "/tmp", 10, False, "a disk of this node (ext4)"),
        ("/usb/a.sqsh", "/tmp/relay", "/tmp", 10, False, "a disk of this node (fuseblk)"),
    ],
)
def test_what_is_far_away_is_copied_to_the_node_s_own_disk(
    archive: str, root: str, disk: str | None, size: int, is_copied: bool, why: str
) -> None:
    own = Path(disk) if disk else None
    found = should_copy(Path(archive), Path(root), size, free=1 << 30, disk=own, mounts=MOUNTS)
    assert found[0] is is_copied and why in found[1]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "far").mkdir()
    return pack(make_lengths(tmp_path / "source", 4096), tmp_path / "far" / "a.sqsh", "-b", "4096")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's own disk, while `far` is said to be on another machine."""
    table = tmp_path / "mountinfo"
    table.write_text(f"1 1 0:1 / / rw - ext4 /dev/root rw\n2 1 0:2 / {tmp_path}/far rw - nfs server:/far rw\n")
    monkeypatch.setattr(squashfs_direct, "MOUNTS", table)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "disk"))
    return tmp_path / "disk" / "relay"


def contents(tree: Tree) -> list[tuple[str, bytes]]:
    return [(tree.name(number), tree.read(number)) for number in range(len(tree)) if not tree.problem(number)]


def test_one_copy_is_made_hashed_on_the_way_and_used(
    archive: Path, disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk.mkdir(parents=True, mode=0o700)
    digest, records = files.sha256(archive), tmp_path / "records"
    name = f"a-{squashfs.key(repr(squashfs.identity(archive)))}.sqsh"
    left, other = disk / f".{name}.0123.tmp", disk / ".b.sqsh.0123.tmp"
    for path in (left, other):
        path.write_text("by a process that was killed")
    tree = squashfs.stage(archive, disk, records)
    assert isinstance(tree, Archive) and tree.path == disk / name and tree.fingerprint == digest
    assert (left.exists(), other.exists()) == (False, True)
    said = capfd.readouterr().err
    assert f"{archive} is copied to {disk / name}: it is on nfs\n" in said
    assert "copy a.sqsh: 100%" in said and "hash a" not in said
    assert (disk / name).read_bytes() == archive.read_bytes()
    archive.unlink()  # from now on it is not looked into
    assert contents(tree) == contents(squashfs.stage(tmp_path / "source", disk))
    assert str(tree) == str(archive)


def test_a_second_process_uses_the_copy(archive: Path, disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = squashfs.stage(archive, disk)
    assert isinstance(first, Archive)
    before = first.path.stat()
    capfd.readouterr()
    second = squashfs.stage(archive, disk)
    assert isinstance(second, Archive)
    after = second.path.stat()
    assert (second.path, after.st_ino, after.st_mtime_ns) == (first.path, before.st_ino, before.st_mtime_ns)
    assert capfd.readouterr().err == ""
    expected = contents(second)
    os.truncate(first.path, 1000)  # such a copy is none
    assert contents(squashfs.stage(archive, disk)) == expected


def test_a_copy_of_the_wrong_archive_never_gets_its_name(archive: Path, disk: Path) -> None:
    archive.with_name("a.sqsh.sha256").write_text("0" * 64)
    with pytest.raises(InputError, match=f"{archive}: damaged or exchanged"):
        squashfs.stage(archive, disk)
    assert {path.suffix for path in disk.iterdir()} == {".lock"}


def test_without_room_for_a_copy_it_is_read_in_place(
    archive: Path, disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", f"size={max(4096, archive.stat().st_size // 2)}"):
        tree = squashfs.stage(archive, disk)
        assert isinstance(tree, Archive) and tree.path == archive
        said = capfd.readouterr().err
        assert f"{archive} is read in place: it is on nfs, but needs 0.00 GiB of 0.00 GiB free on {disk}\n" in said
        assert len(contents(tree)) > 20


def test_the_hash_is_taken_once(archive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    squashfs.stage(archive, root)
    assert "hash a.sqsh: 100%" in capfd.readouterr().err
    squashfs.stage(archive, root)
    assert "hash a" not in capfd.readouterr().err
    os.utime(archive, (1, 1))
    squashfs.stage(archive, root)
    assert "hash a.sqsh: 100%" in capfd.readouterr().err


def test_of_several_processes_one_prepares(archive: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    line = "import sys; from pathlib import Path; from utils import squashfs\n"
    line += "squashfs.stage(sys.argv[1], Path(sys.argv[2]))"
    name = f"a-{squashfs.key(repr(squashfs.identity(archive)))}"
    with files.lock(root / f".{name}.lock"):
        both = [
            subprocess.Popen([sys.executable, "-c", line, archive, root], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in both:
            assert process.stderr
            assert process.stderr.readline() == f"waiting for another process that prepares {root / name}\n"
    errors = "".join(process.communicate()[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert errors.count("hash a.sqsh: 100%") == 1


def can_mount() -> str | None:
    if not shutil.which("squashfuse"):
        return "needs squashfuse"
    return None if os.access("/dev/fuse", os.R_OK | os.W_OK) else "needs /dev/fuse"


NEEDS_FUSE = pytest.mark.skipif(bool(can_mount()), reason=str(can_mount()))


def mount_points(root: Path) -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(root) in line]


HOLDER = """
import sys, time
from pathlib import Path
from utils import squashfs
tree = squashfs.stage(sys.argv[1], Path(sys.argv[2]), None, "mount")
print(len(tree.read(len(tree) - 1)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "root"
    for point in mount_points(tmp_path):
        subprocess.run(["umount", "-l", point], check=True)


def holder(archive: Path, root: Path) -> subprocess.Popen[str]:
    """A process that has the archive mounted."""
    command = [sys.executable, "-c", HOLDER, str(archive), str(root)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and int(process.stdout.readline()) >= 0
    return process


@NEEDS_FUSE
def test_a_mount_lasts_as_long_as_its_process(archive: Path, root: Path) -> None:
    first, second = holder(archive, root), holder(archive, root)
    assert len(mount_points(root)) == 2
    first.communicate("")
    assert len(mount_points(root)) == 1 and first.returncode == 0
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert len(mount_points(root)) == 1
    third = holder(archive, root)  # removes what the second one left, and nothing of its own
    (point,) = mount_points(root)
    third.communicate("")
    assert not mount_points(root)
    assert sorted(path.suffix for path in root.iterdir()) == [".index", ".json", ".lock", ".lock"], point


@NEEDS_FUSE
def test_an_archive_behind_fuse_is_copied(
    archive: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that is far away, as the system itself tells it."""
    monkeypatch.setenv("RELAY_SCRATCH", str(tmp_path / "scratch"))
    outer = pack(archive.parent, tmp_path / "outer.sqsh")
    process = holder(outer, root)
    try:
        (point,) = mount_points(root)
        tree = squashfs.stage(Path(point) / "a.sqsh", tmp_path / "scratch" / "relay")
        assert isinstance(tree, Archive) and tree.path.parent == tmp_path / "scratch" / "relay"
        assert tree.fingerprint == files.sha256(archive)
    finally:
        process.communicate("")
    assert contents(tree) == contents(squashfs.stage(archive, tmp_path / "other"))


def test_a_missing_squashfuse_is_named(archive: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(InputError, match=r"no squashfuse here; install it .* or use direct"):
        squashfs.stage(archive, root, None, "mount")


WAYS: list[Any] = ["direct", "unpack", pytest.param("mount", marks=NEEDS_FUSE)]


@pytest.mark.parametrize("how", WAYS)
def test_every_way_gives_the_same_files_and_fingerprint(how: Stage, archive: Path, root: Path) -> None:
    tree, direct = squashfs.stage(archive, root, None, how), squashfs.stage(archive, root)
    assert tree.fingerprint == direct.fingerprint == files.sha256(archive)
    assert contents(tree) == contents(direct)
    assert [tree.name(number) for number in range(len(tree))] == [direct.name(number) for number in range(len(tree))]
    assert [tree.stamp(number) for number in range(len(tree))] == [direct.stamp(number) for number in range(len(tree))]


def test_a_run_that_began_with_unpacked_data_goes_on_from_the_archive(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, run = pack(write_images(tmp_path / "images", 8), tmp_path / "a.sqsh"), tmp_path / "chain" / "pretrain"
    pretrain(run, data, "data.stage=unpack")
    expected = records(run)
    assert [record["kind"] for record in expected] == ["train", "epoch"] * 2
    (run / "checkpoints" / "checkpoint_0001.pth").unlink()
    capfd.readouterr()
    pretrain(run, data, "data.stage=direct")
    assert records(run) == expected
    said = "".join(capfd.readouterr())
    assert "checkpoint_0000.pth: moco after 1 epochs" in said and f"{data} is read in place" in said
