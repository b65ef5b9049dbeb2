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


def unpack(archive: Path, dest: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m utils.squashfs`, as a user types it."""
    command = [sys.executable, "-m", "utils.squashfs", str(archive), str(dest)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True)
