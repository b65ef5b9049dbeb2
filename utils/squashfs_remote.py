"""Data at a URL: the objects below a prefix, or an archive, which is copied to this node if it fits there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from utils import files, object_cache, paths, squashfs_hash, storage
from utils.archive import Archive
from utils.errors import EnvironmentProblem, InputError
from utils.objects import Objects
from utils.progress import Progress
from utils.squashfs_once import key, locked, say
from utils.squashfs_reader import Reader
from utils.storage import Info


def prepare(url: str, root: Path, records: Path | None, *, whole: bool) -> Archive | Objects:
    """What is at a URL. An archive is copied below `root`, once on this node, or read where it is, by ranges, if it
    does not fit: `whole` demands the copy.

    Both have one fingerprint: the sha256 in `<archive>.sha256`, if there is one, else one of size and checksum. Only a
    copy is compared with it.
    It is kept in the folder `records`, and what a prefix holds as well: other data is refused from then on.

    Raises: InputError if nothing is there, or an archive is damaged or another one; EnvironmentProblem if the storage
    or the disk does not do its part.
    """
    url = url.rstrip("/")
    name = f"{Path(url).stem}-{key(url)}"
    record = records / f"{name}.sha256" if records else None
    paths.make_private(root)
    try:
        of = storage.look(url)
        if of is None:
            objects = Objects(url, (records or root) / f"{name}.list", root / "objects")
            squashfs_hash.settle(url, objects.fingerprint, record)
            return objects
        with Reader(of):
            pass
        known = _beside(url, root)
        fingerprint = known or _fingerprint(of)
        squashfs_hash.settle(url, fingerprint, record)
        copy = _copy(of, root / f"{name}-{key(str(of.stamp))}.sqsh", known, whole)
        with locked(root / fingerprint[:32], "indexes"):
            return Archive(copy or of, fingerprint, root / f"{fingerprint[:32]}.index", url)
    except OSError as error:
        raise EnvironmentProblem(f"cannot prepare {url} in {root}: {error}") from error


def _fingerprint(of: Info) -> str:
    """Of size and checksum: of what was written again as it was, the same."""
    return hashlib.sha256(f"{of.size} {of.stamp if of.crc32c is None else of.crc32c}".encode()).hexdigest()


def _beside(url: str, root: Path) -> str | None:
    """The sha256 that is written down for an archive, if there is one."""
    try:
        beside = storage.info(f"{url}.sha256")
    except InputError:
        return None
    return files.read_sha256(object_cache.Cache(root / "objects").file(beside))


def _copy(of: Info, copy: Path, known: str | None, whole: bool) -> Path | None:
    """The archive as a file; None if it does not fit. Raises: InputError if its sha256 is not what is known."""

    def compare(digest: str) -> None:
        if known not in (None, digest):
            raise InputError(
                f"{of.url}: damaged or exchanged: its sha256 is {digest}, {of.url}.sha256 says {known}; copy it again"
            )

    with locked(copy, "copies"):
        if copy.is_file() and copy.stat().st_size == of.size:
            return copy
        room = object_cache.limit(copy.parent, 0)
        needs, has = (f"{size / 2**30:.2f} GiB" for size in (of.size, room))
        if of.size > room:
            if whole:
                raise EnvironmentProblem(f"{of.url} needs {needs}, {copy.parent} may take {has}; see RELAY_CACHE_GIB")
            say(f"{of.url} is read in place: it needs {needs}, {copy.parent} may take {has}")
            return None
        say(f"{of.url} is copied to {copy}")
        for left in copy.parent.glob(f".{copy.name}.*.tmp"):  # by a process that was killed: we hold the lock
            left.unlink()
        with Progress(f"copy {of.url}", of.size, "B") as progress:
            storage.download(of, copy, compare, progress.update)
        return copy
