"""A stage's input: a folder, or a squashfs archive that is read where it is, unpacked or mounted, checked before.

    python -m utils.squashfs ARCHIVE DEST

unpacks one: a second call finds DEST and returns at once; two jobs on one node unpack once. DEST appears only when
it is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

from utils import paths, squashfs_direct, squashfs_hash, squashfs_mount, squashfs_remote, storage
from utils.archive import Archive
from utils.errors import EnvironmentProblem, InputError, cli
from utils.files import sha256, write_json
from utils.progress import Progress
from utils.shared_config import Stage
from utils.squashfs_once import identity, key, locked, say
from utils.squashfs_reader import Reader
from utils.squashfs_unpack import check, extract, flush, remove, tally
from utils.tree import Folder, Tree

MARKER = ".staged.json"


def stage(source: str | Path, root: Path, records: Path | None = None, how: Stage = "direct") -> Tree:
    """The files of `source`, a folder, an archive, or the URL of either; what is made of an archive is made once,
    under `root`.

    how: "direct", read the archive by an index, see `squashfs_direct`; "unpack" it; "mount" it by squashfuse.
    All three number the files alike and have one fingerprint, the archive's sha256. What is at a URL is copied or read
    there, see `squashfs_remote`.
    The sha256 is kept in the folder `records`; another archive under the same path is refused from then on.

    Raises: InputError if `source` is missing, neither folder nor squashfs, unsafe or another one, see `unpack`;
    EnvironmentProblem if `root` is not ours alone, or full.
    """
    if (file := storage.local(source)) is None:
        return _of_url(str(source), root, records, how)
    path = file.expanduser().resolve()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(f"{source}: not found; give a squashfs archive or the folder unpacked from one")
    paths.make_private(root)
    record = records / f"{path.stem}-{key(str(path))}.sha256" if records else None
    if how == "unpack":
        return _folder(unpack(path, root / f"{path.stem}-{key(repr(identity(path)))}", record))
    archive = squashfs_direct.prepare(path, root, record)
    return squashfs_mount.mount(archive, root) if how == "mount" else archive


def _of_url(url: str, root: Path, records: Path | None, how: Stage) -> Tree:
    tree = squashfs_remote.prepare(url, root, records, whole=how != "direct")
    if how == "direct" or not isinstance(tree, Archive):
        return tree
    if how == "mount":
        return squashfs_mount.mount(tree, root)
    dest = unpack(tree.path, root / f"{tree.path.stem}-{key(repr(identity(tree.path)))}")
    return Folder(dest, fingerprint=tree.fingerprint, but=MARKER)


def _folder(path: Path) -> Folder:
    """A folder; if it was unpacked here it has the fingerprint and the files of its archive."""
    marker = _marker(path)
    return Folder(path, fingerprint=marker["sha256"], but=MARKER) if marker else Folder(path)


def unpack(archive: str | Path, dest: str | Path, record: Path | None = None) -> Path:
    """Unpack `archive` as the new folder `dest`, or find it there, and return its absolute path.

    Its sha256 is compared with `<archive>.sha256`, if there is one, and with `record`, which is made if need be.

    Raises: InputError if the archive is damaged, cut short or another one, holds device nodes, setuid files or
    links that leave it, or if `dest` is something else; EnvironmentProblem if there is not enough space.
    """
    archive, dest = Path(archive).expanduser().resolve(), Path(os.path.abspath(dest))
    try:
        with Reader(archive) as reader:
            who = identity(archive)
            digest = _staged(dest, who)
            if not digest:
                with locked(dest, "unpacks"):
                    digest = _staged(dest, who) or _unpack(archive, reader, dest, who, record)
        squashfs_hash.settle(archive, digest, record)
        return dest
    except OSError as error:
        raise EnvironmentProblem(f"cannot unpack {archive} as {dest}: {error}") from error


def _is_our_folder(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("sha256"), str) else None


def _staged(dest: Path, who: dict[str, Any]) -> str | None:
    """The archive's sha256 if `dest` is it, unpacked by this user. Raises: InputError if it is anything else."""
    if not os.path.lexists(dest):
        return None
    marker = _marker(dest)
    if not _is_our_folder(dest) or not marker:
        raise InputError(f"{dest} exists and was not unpacked here by this user; remove it or name another")
    if not who.items() <= marker.items():
        raise InputError(f"{dest} holds another archive, {marker.get('archive')}; remove it or name another")
    say(f"{who['archive']} is already unpacked: {dest}")
    return marker["sha256"]


def _unpack(archive: Path, reader: Reader, dest: Path, who: dict[str, Any], record: Path | None) -> str:
    """Returns the archive's sha256."""
    prefix = f".{dest.name}.{socket.gethostname()}."
    for left in dest.parent.iterdir():  # by a process of this node that was killed: we hold the lock
        if left.name.startswith(prefix) and _is_our_folder(left):
            remove(left)
    files, size = check(archive, reader, dest.parent)
    with Progress(f"hash {archive.name}", who["size"], "B") as progress:
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
        write_json(tree / MARKER, who | {"files": files, "bytes": size, "sha256": digest})
        try:
            tree.rename(dest)
        except OSError:  # on a shared disk another node, where our lock does not hold, may have been first
            if not (staged := _staged(dest, who)):
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
