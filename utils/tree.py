"""A set of files, in a folder or in an archive, the same to whoever reads it.

Files are numbered from 0 in the order of their paths. Numbers, not names, are what is kept per image: of half a
million files they are 4 MB that loader processes share.
"""

from __future__ import annotations

import hashlib
import os
import stat
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, overload

import numpy as np

from utils.errors import InputError

LARGEST = 1 << 29  # bytes that are read at once: more than an image of images.MAX_PIXELS takes
MOST_WAYS = 16  # from the root to one folder through links to folders
NO_FILE = "not a file, or a link to none"
TOO_LARGE = f"over the limit of {LARGEST >> 20} MiB for a file"


class Tree(Protocol):
    """Files below a root. Reading is safe in forked and in spawned processes."""

    @property
    def fingerprint(self) -> str:
        """Which content it is: an archive's sha256, of a folder a hash of names and sizes."""

    def __str__(self) -> str:
        """The folder or archive, for messages."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """The path below the root, with `/`."""

    def shown(self, number: int) -> str:
        """The path for messages: root and name."""

    def stamp(self, number: int) -> tuple[int, int]:
        """Bytes, and mtime in ns: another stamp is another content."""

    def find(self, folder: str = "", suffixes: Sequence[str] = (), *, deep: bool = True) -> np.ndarray:
        """Numbers, ascending, of the files in `folder`, and below it if `deep`, whose name ends in one of `suffixes`.

        In any case of letters. Hidden files are left out: they belong to other programs.
        """

    def problem(self, number: int) -> str | None:
        """Why a file cannot be read, without reading it: it is a FIFO, or a link to nothing."""

    def ahead(self, numbers: Sequence[int]) -> None:
        """These will be read next, by this process: get all of them at once where each takes a while to come."""

    def read(self, number: int) -> bytes:
        """A file's content. Raises: InputError naming the file."""


class Folder:
    """Everything in a folder but folders; links are followed.

    `fingerprint` is that of the archive it was unpacked from, and `but` the name of a file that was not in there.
    Links to folders are not followed then, so that the files are those of the archive.
    """

    def __init__(self, root: Path, *, fingerprint: str | None = None, but: str | None = None) -> None:
        self.root = Path(os.path.abspath(root))
        if fingerprint:
            self.fingerprint = fingerprint
        self._start = os.path.join(self.root, "")
        names = []
        reached = Counter[str]()
        above: dict[str, frozenset[str]] = {str(self.root): frozenset()}  # the real folders that lead to each
        for parent, folders, found in os.walk(self.root, onerror=_refuse, followlinks=not fingerprint):
            real = os.path.realpath(parent)
            here = above.pop(parent) | {real}
            reached[real] += 1
            if reached[real] > MOST_WAYS:
                raise InputError(
                    f"{self.root}: links lead to {real} in more than {MOST_WAYS} ways; give a plain folder"
                )
            # a link back to one of them would be a loop
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) not in here]
            above |= {os.path.join(parent, name): here for name in folders}
            folder = os.path.join(parent, "")[len(self._start) :]
            names += [folder + name for name in found]
        self._names = sorted(name for name in names if name != but)

    @cached_property
    def fingerprint(self) -> str:
        lines = [os.fsencode(name) + b"\0%d\n" % self.stamp(number)[0] for number, name in enumerate(self._names)]
        return hashlib.sha256(b"".join(sorted(lines))).hexdigest()

    def __str__(self) -> str:
        return str(self.root)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        return self._names[number]

    def shown(self, number: int) -> str:
        return self._start + self._names[number]

    def stamp(self, number: int) -> tuple[int, int]:
        path = self._start + self._names[number]
        try:
            status = os.stat(path)
        except OSError:
            status = os.lstat(path)
        return status.st_size, status.st_mtime_ns

    def find(self, folder: str = "", suffixes: Sequence[str] = (), *, deep: bool = True) -> np.ndarray:
        return matching(self._names, folder, suffixes, deep)

    def problem(self, number: int) -> str | None:
        try:
            status = os.stat(self._start + self._names[number])
        except OSError:
            return NO_FILE
        if not stat.S_ISREG(status.st_mode):
            return NO_FILE
        return TOO_LARGE if status.st_size > LARGEST else None

    def leads_out(self, number: int) -> str | None:
        """What a file links to, if that is outside the folder."""
        path = self._start + self._names[number]
        if not os.path.islink(path) or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
            return None
        return os.readlink(path)

    def ahead(self, numbers: Sequence[int]) -> None:
        pass

    def read(self, number: int) -> bytes:
        if problem := self.problem(number):  # opening a FIFO would wait for ever
            raise InputError(f"{self.shown(number)}: {problem}")
        try:
            with open(self._start + self._names[number], "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise InputError(f"{self.shown(number)}: {error.strerror}") from None


class Names(Sequence[str]):
    """Paths one after another, in (B,) uint8 and (N + 1,) int64; each is made into `str` when it is asked for."""

    def __init__(self, names: np.ndarray, ends: np.ndarray) -> None:
        self._bytes, self._ends = names.tobytes(), ends.data

    @staticmethod
    def arrays(names: Iterable[str]) -> dict[str, np.ndarray]:
        """What an object is made of."""
        paths = [os.fsencode(name) for name in names]
        ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
        return {"names": np.frombuffer(b"".join(paths), dtype=np.uint8), "ends": ends}

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        return os.fsdecode(self._bytes[self._ends[number] : self._ends[number + 1]])


def matching(names: Sequence[str], folder: str, suffixes: Sequence[str], deep: bool) -> np.ndarray:
    """`Tree.find` over sorted names."""
    start = f"{folder}/" if folder else ""
    first, end = (bisect_left(names, start), bisect_left(names, f"{folder}0")) if folder else (0, len(names))
    found = []
    for number in range(first, end):  # "0" is the character after "/"
        rest = names[number][len(start) :]
        hidden = rest.startswith(".") or "/." in rest
        if (deep or "/" not in rest) and not hidden and rest.lower().endswith(tuple(suffixes) or ""):
            found.append(number)
    return np.array(found, dtype=np.int64)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}")
