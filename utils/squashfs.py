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

from utils import paths, squashfs_hash
from utils.errors import EnvironmentProblem, InputError, cli
from utils.files import lock, sha256, write_json
from utils.progress import Progress
from utils.squashfs_reader import Reader
from utils.squashfs_unpack import check, extract, flush, remove, say, tally

MARKER = ".staged.json"


def stage(source: str | Path, root: Path, records: Path | None = None) -> Path:
    """The folder with `source`'s content: itself, or for an archive its one unpacked copy under `root`.

    The archive's sha256 is kept in the folder `records`; another archive under the same path is refused from then on.

    Raises: InputError if `source` is missing, neither folder nor squashfs, unsafe or another one, see `unpack`;
    EnvironmentProblem if `root` is not ours alone, or full.
    """
    path = Path(source).expanduser().resolve()
    if path.is_dir():
        return path
    if not path.is_file():
        raise InputError(f"{source}: not found; give a squashfs archive or the folder unpacked from one")
    paths.make_private(root)
    record = records / f"{path.stem}-{_key(str(path))}.sha256" if records else None
    return unpack(path, root / f"{path.stem}-{_key(repr(_identity(path)))}", record)


def fingerprint(folder: Path) -> str:
    """Which data `folder`, made by `stage`, holds: the archive's sha256, or a hash of the names and sizes in it."""
    marker = _marker(folder)
    return marker["sha256"] if marker else squashfs_hash.of_folder(folder)


def unpack(archive: str | Path, dest: str | Path, record: Path | None = None) -> Path:
    """Unpack `archive` as the new folder `dest`, or find it there, and return its absolute path.

    Its sha256 is compared with `<archive>.sha256`, if there is one, and with `record`, which is made if need be.

    Raises: InputError if the archive is damaged, cut short or another one, holds device nodes, setuid files or
    links that leave it, or if `dest` is something else; EnvironmentProblem if there is not enough space.
    """
    archive, dest = Path(archive).expanduser().resolve(), Path(os.path.abspath(dest))
    try:
        with Reader(archive) as reader:
            identity = _identity(archive)
            digest = _staged(dest, identity)
            if not digest:
                with _locked(dest):
                    digest = _staged(dest, identity) or _unpack(archive, reader, dest, identity, record)
        squashfs_hash.compare(archive, digest, record)
        if record and not record.exists():
            squashfs_hash.remember(archive, digest, record)
        return dest
    except OSError as error:
        raise EnvironmentProblem(f"cannot unpack {archive} as {dest}: {error}") from error


def _identity(archive: Path) -> dict[str, Any]:
    status = archive.stat()
    return {"archive": str(archive), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_our_folder(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("sha256"), str) else None


def _staged(dest: Path, identity: dict[str, Any]) -> str | None:
    """The archive's sha256 if `dest` is it, unpacked by this user. Raises: InputError if it is anything else."""
    if not os.path.lexists(dest):
        return None
    marker = _marker(dest)
    if not _is_our_folder(dest) or not marker:
        raise InputError(f"{dest} exists and was not unpacked here by this user; remove it or name another")
    if not identity.items() <= marker.items():
        raise InputError(f"{dest} holds another archive, {marker.get('archive')}; remove it or name another")
    say(f"{identity['archive']} is already unpacked: {dest}")
    return marker["sha256"]


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


def _unpack(archive: Path, reader: Reader, dest: Path, identity: dict[str, Any], record: Path | None) -> str:
    """Returns the archive's sha256."""
    prefix = f".{dest.name}.{socket.gethostname()}."
    for left in dest.parent.iterdir():  # by a process of this node that was killed: we hold the lock
        if left.name.startswith(prefix) and _is_our_folder(left):
            remove(left)
    files, size = check(archive, reader, dest.parent)
    with Progress(f"hash {archive.name}", identity["size"], "B") as progress:
        digest = sha256(archive, progress.update)
    squashfs_hash.compare(archive, digest, record)  # before it takes time and space
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=dest.parent))
    tree = temporary / "tree"
    try:
        extract(archive, reader, tree, size)
        if (unpacked := tally(tree)) != (files, size):
            raise InputError(f"{archive}: lists {files} files, {size} bytes, gave {unpacked}; copy it again")
        os.chown(tree, os.geteuid(), os.getegid())  # to root, unsquashfs gives the archive's owners
        flush(tree)
        write_json(tree / MARKER, identity | {"files": files, "bytes": size, "sha256": digest})
        try:
            tree.rename(dest)
        except OSError:  # on a shared disk another node, where our lock does not hold, may have been first
            if not (staged := _staged(dest, identity)):
                raise
            digest = staged
    finally:
        remove(temporary)
    return digest


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
