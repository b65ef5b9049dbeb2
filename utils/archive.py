"""The files in a squashfs archive, read where they are: no unpacking, no mount."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from utils import squashfs_index
from utils.errors import InputError
from utils.squashfs_blocks import Blocks, Tail
from utils.tree import LARGEST, NO_FILE, TOO_LARGE, matching


class Archive:
    """A `Tree` over an archive: numbers, names and stamps are those of the folder unpacked from it.

    Each process opens the file for itself and reads with `pread`, so that nothing is shared with the others. A
    spawned process is sent paths and the hash, and loads the index.

    path:   the file that is read
    digest: its sha256
    cache:  where the index is kept, in a folder of this user alone
    source: the path for messages, if `path` is a copy
    identity: size and mtime of the file that was indexed, if that was done by another process

    Raises: InputError if the archive is damaged, or holds device nodes, setuid files or links that leave it.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        cache: Path,
        source: Path | None = None,
        identity: tuple[int, int] | None = None,
    ) -> None:
        self.path, self.fingerprint, self._cache, self.source = path, digest, cache, source or path
        self._identity = identity or _identity(os.stat(path))
        index = squashfs_index.load(path, digest, cache)
        self._names = _Names(index)
        self._rows, self._sizes = index.rows, index.sizes.data
        self._opened: tuple[int, Blocks] | None = None  # and by which process

    def __reduce__(self) -> tuple[type[Archive], tuple[Path, str, Path, Path, tuple[int, int]]]:
        return Archive, (self.path, self.fingerprint, self._cache, self.source, self._identity)

    def __str__(self) -> str:
        return str(self.source)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        return self._names[number]

    def shown(self, number: int) -> str:
        return f"{self.source}/{self._names[number]}"

    def stamp(self, number: int) -> tuple[int, int]:
        size, seconds = self._rows[number, :2].tolist()
        return size, seconds * 10**9

    def find(self, folder: str = "", suffixes: Sequence[str] = (), *, deep: bool = True) -> np.ndarray:
        return matching(self._names, folder, suffixes, deep)

    def problem(self, number: int) -> str | None:
        if self._rows[number, -1]:
            return None
        return TOO_LARGE if self._rows[number, 0] > LARGEST else NO_FILE

    def read(self, number: int) -> bytes:
        size, _, start, first, position, stored, offset, is_readable = self._rows[number].tolist()
        if not is_readable:
            raise InputError(f"{self.shown(number)}: {self.problem(number)}")
        try:
            opened = self._opened
            blocks = opened[1] if opened and opened[0] == os.getpid() else self._open()
            count = size // blocks.block_size
            tail = Tail(position, stored, offset) if stored >= 0 else None
            if not tail and size % blocks.block_size:
                count += 1
            return blocks.whole(self._names[number], size, start, self._sizes[first : first + count], tail)
        except OSError as error:
            raise InputError(f"{self.shown(number)}: {error.strerror}") from None

    def _open(self) -> Blocks:
        """The file, opened by this process. Raises: InputError if it is not the one that was indexed."""
        blocks = Blocks(self.path, self.source)
        if _identity(os.fstat(blocks.descriptor)) != self._identity:
            blocks.close()
            raise InputError(f"{self.source}: changed while it was in use; start again")
        self._opened = os.getpid(), blocks  # at once: several threads may be here
        return blocks


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class _Names(Sequence[str]):
    """Paths made into `str` when they are asked for."""

    def __init__(self, index: squashfs_index.Index) -> None:
        self._bytes, self._ends = index.names.tobytes(), index.ends.data

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
