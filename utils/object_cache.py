"""Objects kept on this node's disk, for all processes of this user, up to a limit. Torch-free.

    used                          as long as the cache has pages: appended to without a lock, corrected when it is full
    <xx>/<sha256 of what it is>   an object; for `fetch` a folder with the object under its own name

RELAY_CACHE_GIB is the limit; without it, half of what the disk has free or the cache holds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils import files, paths, storage
from utils.errors import EnvironmentProblem, InputError
from utils.squashfs_once import locked
from utils.storage import Info, Part

PAGE = 4096  # what even a tiny file takes on disk
# Each image is read once an epoch, each time in another order: to put one in the place of another that is still in
# use gains nothing. So what was used within these seconds stays, and what finds no room is not kept.
IDLE = 3600.0
HELD = 3600.0  # that a process may take to write a file, or to read one that it was given
PAUSE = 60.0  # seconds before a process looks for room again
FILL = 7 / 8  # of the limit, that is left after making room


def fetch(path: str | Path, root: Path) -> Path:
    """A local file: a path as it is, an object from the cache below `root`. Raises: as `storage.info`."""
    if (file := storage.local(path)) is not None:
        return file
    return Cache(root / "objects").file(storage.info(str(path)))


def limit(folder: Path, used: int) -> int:
    """Bytes that a cache of `used` bytes in `folder` may take."""
    text = os.environ.get("RELAY_CACHE_GIB")
    if text is None:
        return (used + files.free_space(folder)) // 2
    try:
        return int(float(text) * 2**30)
    except ValueError:
        raise InputError(f"RELAY_CACHE_GIB={text}: expected a number, of GiB") from None


class Cache:
    """The cache in `folder`. Safe in forks, in spawned processes and in threads.

    Raises: EnvironmentProblem if the folder is not this user's alone; reading, as `storage.read_many`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths.make_private(folder)
        self._ahead: dict[Info, bytes] = {}
        self._full_until = 0.0

    def __reduce__(self) -> tuple[type[Cache], tuple[Path]]:
        return Cache, (self.folder,)

    def read(self, of: Info) -> bytes:
        """The content of an object."""
        content = self._ahead.pop(of, None) or self._kept(of)
        if content is None:
            content = storage.read(of)
            self._keep(of, content)
        return content

    def ahead(self, objects: Sequence[Info]) -> None:
        """Get what is missing of `objects`, all at once, since it will be read soon, by this process."""
        self._ahead = {}  # in memory, since what finds no room on the disk would be asked for twice
        missing = [of for of in objects if not self._place(of).exists()]
        for of, content in zip(missing, storage.read_many([Part(of, 0, of.size) for of in missing]), strict=True):
            self._keep(of, content)
            self._ahead[of] = content

    def file(self, of: Info) -> Path:
        """An object as a file of its name, which stays for the next hour. For it, any that is no file makes room."""
        place = self._place(of)
        path = place / (of.url.rpartition("/")[2].strip(".") or "object")
        place.parent.mkdir(mode=0o700, exist_ok=True)
        with locked(place, f"gets {of.url} as"):
            if path.exists() and path.stat().st_size == of.size:
                os.utime(path)
                return path
            temporary = _temporary(place)
            if not self._reserve(temporary, of.size, pressing=True):
                raise EnvironmentProblem(
                    f"{self.folder}: no room for {of.url}, {of.size / 2**30:.2f} GiB; set a larger RELAY_CACHE_GIB"
                )
            try:
                storage.download(of, path)
            finally:
                temporary.unlink()
            return path

    def _place(self, of: Info) -> Path:
        key = hashlib.sha256(f"{of.url}\0{of.stamp}\0{of.size}".encode()).hexdigest()
        return self.folder / key[:2] / key

    def _kept(self, of: Info) -> bytes | None:
        """What is kept of an object, if it is whole: none of it is flushed when it is written."""
        with contextlib.suppress(FileNotFoundError), open(self._place(of), "rb", buffering=0) as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > IDLE / 4:
                os.utime(file.fileno())
            content = file.readall()
            if len(content) == of.size and not storage.differs(of, content):
                return content
        return None

    def _keep(self, of: Info, content: bytes) -> None:
        if time.monotonic() < self._full_until:
            return
        place = self._place(of)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = _temporary(place)
        if not self._reserve(temporary, len(content)):
            return
        try:
            with open(temporary, "r+b", buffering=0) as file:
                file.write(content)
            os.replace(temporary, place)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._full_until = time.monotonic() + PAUSE  # by what others wrote

    def _reserve(self, temporary: Path, size: int, *, pressing: bool = False) -> bool:
        """Whether so many bytes may be written, for which what was used longest ago is removed.

        If so, `temporary` is a new file of that size with nothing in it, so that others count it.
        pressing: even what is in use. Else, while another process makes room, there is none.
        """
        with open(temporary, "xb") as file:
            file.truncate(size)
        with open(self.folder / "used", "ab", buffering=0) as counter:
            counter.write(bytes(_pages(size)))
            used = os.fstat(counter.fileno()).st_size * PAGE
            if used <= limit(self.folder, used):
                return True
            with contextlib.suppress(BlockingIOError), files.lock(self.folder / ".lock", blocking=pressing):
                counted = os.fstat(counter.fileno()).st_size
                pages = self._make_room(math.inf if pressing else time.time() - IDLE)
                pages += os.fstat(counter.fileno()).st_size - counted  # what others began to write meanwhile
                counter.truncate(pages)
                if pages * PAGE <= limit(self.folder, pages * PAGE):
                    return True
        temporary.unlink()
        self._full_until = time.monotonic() + PAUSE
        return False

    def _make_room(self, before: float) -> int:
        """Remove files last used before that time, the oldest first. Returns the pages in use."""
        found = sorted(self._files())
        used = sum(taken for _, taken, _ in found)
        goal = limit(self.folder, used * PAGE) * FILL / PAGE
        for seconds, taken, path in found:
            if used <= goal or seconds >= before:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= taken
        return used

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """When last used, pages and path of each; of one that is being written, or was handed out as a file, never."""
        for folder, _, names in os.walk(self.folder):
            for name in names if folder != str(self.folder) else ():
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    may_be_open = name.startswith(".") or os.path.dirname(folder) != str(self.folder)
                    is_held = may_be_open and status.st_mtime > time.time() - HELD
                    yield math.inf if is_held else status.st_mtime, _pages(status.st_size), path


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.{secrets.token_hex(8)}.tmp")


def _pages(size: int) -> int:
    return max(1, -(-size // PAGE))
