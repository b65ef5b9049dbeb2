"""Unpack a squashfs archive once per node, checked before and after.

    python -m utils.squashfs ARCHIVE DEST

A second call finds DEST and returns at once; two jobs on one node unpack once. DEST appears only when
it is whole. `stage` is the same for a stage's input, which may be an archive or a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import EnvironmentProblem, InputError, cli
from utils.files import lock, write_json
from utils.squashfs_reader import Reader
from utils.squashfs_unpack import check, extract, flush, remove, say, tally

MARKER = ".staged.json"


def stage(source: str | Path, root: Path) -> Path:
    """The folder with `source`'s content: itself, or for an archive its one unpacked copy under `root`.

    Raises: InputError if `source` is missing, neither folder nor squashfs, or unsafe, see `unpack`;
    EnvironmentProblem if `root` is not ours alone, or full.
    """
    path = Path(source).expanduser().resolve()
    if path.is_dir():
        return path
    if not path.is_file():
        raise InputError(f"{source}: not found; give a squashfs archive or the folder unpacked from one")
    _make_private(root)
    key = hashlib.sha256(repr(_identity(path)).encode()).hexdigest()[:12]
    return unpack(path, root / f"{path.stem}-{key}")


def unpack(archive: str | Path, dest: str | Path) -> Path:
    """Unpack `archive` as the new folder `dest`, or find it there, and return its absolute path.

    Raises: InputError if the archive is damaged or cut short, holds device nodes, setuid files or links
    that leave it, or if `dest` is something else; EnvironmentProblem if there is not enough space.
    """
    archive, dest = Path(archive).expanduser().resolve(), Path(os.path.abspath(dest))
    try:
        with Reader(archive) as reader:
            identity = _identity(archive)
            if _is_staged(dest, identity):
                return dest
            with _locked(dest):
                if not _is_staged(dest, identity):
                    _unpack(archive, reader, dest, identity)
                return dest
    except OSError as error:
        raise EnvironmentProblem(f"cannot unpack {archive} as {dest}: {error}") from error


def _identity(archive: Path) -> dict[str, Any]:
    status = archive.stat()
    return {"archive": str(archive), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _make_private(root: Path) -> None:
    if not os.path.lexists(root):
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)  # other ranks may be here too
        except OSError as error:
            raise EnvironmentProblem(f"staging folder {root}: cannot be made: {error.strerror}") from error
    mode = root.lstat().st_mode
    if not _is_our_folder(root) or (mode & 0o022 and not mode & stat.S_ISVTX):
        raise EnvironmentProblem(
            f"staging folder {root}: must be a real folder of this user that others cannot write to"
        )


def _is_our_folder(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _is_staged(dest: Path, identity: dict[str, Any]) -> bool:
    """Whether `dest` is this archive, unpacked by this user. Raises: InputError if it is anything else."""
    if not os.path.lexists(dest):
        return False
    try:
        marker = json.loads((dest / MARKER).read_text())
    except (OSError, ValueError):
        marker = None
    if not _is_our_folder(dest) or not isinstance(marker, dict):
        raise InputError(f"{dest} exists and was not unpacked here by this user; remove it or name another")
    if not identity.items() <= marker.items():
        raise InputError(f"{dest} holds another archive, {marker.get('archive')}; remove it or name another")
    say(f"{identity['archive']} is already unpacked: {dest}")
    return True


@contextlib.contextmanager
def _locked(dest: Path) -> Iterator[None]:
    path = dest.with_name(f".{dest.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(path, blocking=False))
        except BlockingIOError:
            say(f"waiting for another process that unpacks {dest}")
            stack.enter_context(lock(path))
        yield


def _unpack(archive: Path, reader: Reader, dest: Path, identity: dict[str, Any]) -> None:
    prefix = f".{dest.name}.{socket.gethostname()}."
    for left in dest.parent.iterdir():  # by a process of this node that was killed: we hold the lock
        if left.name.startswith(prefix) and _is_our_folder(left):
            remove(left)
    files, size = check(archive, reader, dest.parent)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=dest.parent))
    tree = temporary / "tree"
    try:
        extract(archive, reader, tree, size)
        if (unpacked := tally(tree)) != (files, size):
            raise InputError(f"{archive}: lists {files} files, {size} bytes, gave {unpacked}; copy it again")
        os.chown(tree, os.geteuid(), os.getegid())  # to root, unsquashfs gives the archive's owners
        flush(tree)
        write_json(tree / MARKER, identity | {"files": files, "bytes": size})
        try:
            tree.rename(dest)
        except OSError:  # on a shared disk another node, where our lock does not hold, may have been first
            if not _is_staged(dest, identity):
                raise
    finally:
        remove(temporary)


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser("python -m utils.squashfs", description="Unpack an archive, once.")
    parser.add_argument("archive", type=Path)
    parser.add_argument("dest", type=Path, help="the folder to make; if it exists it must be this archive")
    arguments = parser.parse_args(argv)
    dest = unpack(arguments.archive, arguments.dest)
    print(dest)
    return dest


if __name__ == "__main__":
    cli(main)
