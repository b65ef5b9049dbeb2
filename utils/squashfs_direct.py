"""An archive that is read where it is, or from a copy of the one file on the node's own disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from utils import paths, squashfs_hash
from utils.archive import Archive
from utils.errors import EnvironmentProblem, InputError
from utils.files import free_space, sha256, write_atomic, write_json
from utils.progress import Progress
from utils.squashfs_once import identity, key, locked, say
from utils.squashfs_reader import Reader

PIECE = 4 << 20
MOUNTS = Path("/proc/self/mountinfo")
# File systems behind a network or another process, by the names mountinfo has for them. Each read of an image waits
# for them; "fuseblk" is not one, it is a local disk.
REMOTE = frozenset(
    {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "orangefs", "pvfs2", "panfs"}
    | {"wekafs", "virtiofs", "gfs2", "ocfs2", "fuse"}
)


def prepare(archive: Path, root: Path, record: Path | None) -> Archive:
    """`archive`, hashed, indexed and if it is worth it copied below `root`: once on this node.

    Its sha256 is compared with `<archive>.sha256`, if there is one, and with `record`, which is made if need be.

    Raises: InputError if the archive is damaged or another one, or holds what `squashfs_reader.danger` refuses;
    EnvironmentProblem if the disk does not do its part.
    """
    try:
        with Reader(archive):
            who = identity(archive)
        name = f"{archive.stem}-{key(repr(who))}"
        copy, note = root / f"{name}.sqsh", root / f"{name}.json"
        with locked(root / name, "prepares"):
            noted = digest = _noted(note, who)
            is_copied = bool(digest) and copy.is_file() and copy.stat().st_size == who["size"]
            if not is_copied:
                mounts = MOUNTS.read_text() if MOUNTS.exists() else ""
                disk, free = paths.node_disk(), free_space(root)
                is_copied, why = should_copy(archive, root, who["size"], free=free, disk=disk, mounts=mounts)
                say(f"{archive} is {'copied to ' + str(copy) if is_copied else 'read in place'}: {why}")
                if is_copied:
                    digest = copy_whole(archive, copy, record)
                elif not digest:
                    with Progress(f"hash {archive.name}", who["size"], "B") as progress:
                        digest = sha256(archive, progress.update)
                    squashfs_hash.compare(archive, digest, record)
                if identity(archive) != who:
                    raise InputError(f"{archive}: changed while it was read; start again")
                if digest != noted:
                    write_json(note, who | {"sha256": digest})
            assert digest
            index = root / f"{digest[:32]}.index"
            tree = Archive(copy if is_copied else archive, digest, index, archive)
            if identity(archive) != who:  # what was noted may be of one archive, the index of another
                index.unlink()
                note.unlink()
                raise InputError(f"{archive}: changed while it was read; start again")
        squashfs_hash.settle(archive, digest, record)
        return tree
    except OSError as error:
        raise EnvironmentProblem(f"cannot prepare {archive} in {root}: {error}") from error


def should_copy(archive: Path, root: Path, size: int, *, free: int, disk: Path | None, mounts: str) -> tuple[bool, str]:
    """Whether an archive of `size` bytes is copied below `root` before it is read, and why, in words for the log.

    Each image is read once an epoch. From a file system over the network that is one request an image that others
    wait for as well; one copy is the same bytes once, in order. So it is copied from such a file system to `disk`,
    the node's own, if `root` is on it and has `free` bytes enough. `mounts` is the text of /proc/self/mountinfo.
    """
    kind, kind_here = file_system(archive, mounts), file_system(root.resolve(), mounts)
    if not _is_remote(kind):
        return False, f"it is on a disk of this node ({kind})"
    if not disk or not root.is_relative_to(disk):
        return False, f"it is on {kind}, but neither SLURM_TMPDIR nor RELAY_SCRATCH names a disk of this node"
    if _is_remote(kind_here):
        return False, f"it is on {kind}, but so is {root}, on {kind_here}"
    if size > free:
        return False, f"it is on {kind}, but needs {size / 2**30:.2f} GiB of {free / 2**30:.2f} GiB free on {root}"
    return True, f"it is on {kind}"


def file_system(path: Path, mounts: str) -> str:
    """The type of file system that an absolute `path` is on, by the text of /proc/self/mountinfo."""
    found, kind = Path(), "an unknown file system"
    for line in mounts.splitlines():
        fields, _, source = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields.split(" ")[4]))
        if path.is_relative_to(point) and len(point.parts) >= len(found.parts):  # the later of two is over the other
            found, kind = point, source.split(" ")[0]
    return kind


def _is_remote(kind: str) -> bool:
    return kind in REMOTE or kind.startswith("fuse.")


def _noted(note: Path, who: dict[str, Any]) -> str | None:
    """The sha256 that was found for this archive, if it was."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(note.read_text())
        if isinstance(content, dict) and who.items() <= content.items() and isinstance(content.get("sha256"), str):
            return content["sha256"]
    return None


def copy_whole(archive: Path, copy: Path, record: Path | None) -> str:
    """Returns the sha256, taken on the way; it is compared before the copy has its name."""
    for left in copy.parent.glob(f".{copy.name}.*.tmp"):  # by a process that was killed: we hold the lock
        left.unlink()

    def write(file: BinaryIO) -> None:
        with open(archive, "rb", buffering=0) as source, Progress(f"copy {archive.name}", size, "B") as progress:
            while piece := source.read(PIECE):
                file.write(piece)
                progress.update(len(piece))

    size = os.path.getsize(archive)
    return write_atomic(copy, write, lambda digest: squashfs_hash.compare(archive, digest, record))
