"""Archives for tests, made by the real mksquashfs, and what is in a tree or an archive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from utils import squashfs
from utils.paths import ROOT
from utils.squashfs_reader import Reader
from utils.tree import Tree

NEEDS_TOOLS = pytest.mark.skipif(not shutil.which("mksquashfs"), reason="needs squashfs-tools")
LISTABLE = ("-noI", "-noF", "-noD")  # metadata and data as they are, so that a test can patch them


def make_sample(folder: Path) -> Path:
    """A folder with every kind of content that squashfs stores in its own way."""
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


def make_lengths(folder: Path, block: int) -> Path:
    """A folder with files of every length that blocks of this size make special, and every way to store them."""
    random = Random(block)
    lengths = (0, 1, 2, block // 2, block - 1, block, block + 1, 2 * block, 3 * block + 17)
    for kind in ("noise", "text", "mixed"):
        (folder / kind).mkdir(parents=True)
        for length in lengths:
            noise, text = random.randbytes(length), b"0123456789abcdef" * (length // 16 + 1)
            half = length // 2 // block * block
            content = {"noise": noise, "text": text[:length], "mixed": noise[:half] + text[: length - half]}[kind]
            (folder / kind / f"{length}.bin").write_bytes(content)
    for name, places in {"all": [], "first": [3 * block], "middle": [0, 2 * block], "last": [0]}.items():
        with open(folder / f"holes {name}", "wb") as file:
            file.truncate(3 * block + 5)
            for place in places:
                file.seek(place)
                file.write(b"x")
    os.link(folder / "noise" / f"{3 * block + 17}.bin", folder / "hard link")
    os.link(folder / "text" / "1.bin", folder / "small hard link")
    (folder / "copy").write_bytes((folder / "noise" / f"{block + 1}.bin").read_bytes())
    (folder / "link").symlink_to("hard link")
    for path in folder.rglob("*"):
        os.utime(path, (1_600_000_000 + random.randrange(10**8),) * 2, follow_symlinks=False)
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


def read_one(tree: Tree, number: int) -> bytes:
    """For a process of a pool, which imports this module and no torch."""
    return tree.read(number)


def assert_nothing_left(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} <= {".sqsh", ".lock"}


def unpack(archive: Path, dest: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m utils.squashfs`, as a user types it."""
    command = [sys.executable, "-m", "utils.squashfs", str(archive), str(dest)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True)
