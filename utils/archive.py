"""The files in a squashfs archive, read where they are, on a disk or in a bucket: no unpacking, no mount."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils import squashfs_index, squashfs_source
from utils.errors import InputError
from utils.squashfs_blocks import Blocks, Tail
from utils.storage import Info
from utils.tree import LARGEST, NO_FILE, TOO_LARGE, Names, matching


class Archive:
    """A `Tree` over an archive: numbers, names and stamps are those of the folder unpacked from it.

    Each process opens the file for itself and reads with `pread`, so that nothing is shared with the others. A
    spawned process is sent paths and the hash, and loads the index.

    file:   what is read, on a disk or in a bucket
    digest: its sha256
    cache:  where the index is kept, in a folder of this user alone
    source: the path for messages, if `file` is a copy
    identity: that of the file that was indexed, if that was done by another process

    Raises: InputError if the archive is damaged, or holds device nodes, setuid files or links that leave it.
    """

    def __init__(
        self,
        file: Path | Info,
        digest: str,
        cache: Path,
        source: Path | str | None = None,
        identity: tuple[int, int] | None = None,
    ) -> None:
        self.file, self.fingerprint, self._cache = file, digest, cache
        self.source = source or squashfs_source.shown(file)
        self._identity = identity or squashfs_source.identity(file)
        index = squashfs_index.load(file, digest, cache)
        self._names = Names(index.names, index.ends)
        self._rows, self._sizes = index.rows, index.sizes.data
        self._opened: tuple[int, Blocks] | None = None  # and by which process

    def __reduce__(self) -> tuple[type[Archive], tuple[Any, ...]]:
        return Archive, (self.file, self.fingerprint, self._cache, self.source, self._identity)

    @property
    def path(self) -> Path:
        """The file that is read; not of an archive that is read in a bucket."""
        assert isinstance(self.file, Path)
        return self.file

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

    def ahead(self, numbers: Sequence[int]) -> None:
        if isinstance(self.file, Info):
            blocks = self._blocks()
            blocks.ahead([self._where(number, blocks) for number in numbers if self._rows[number, -1]])

    def read(self, number: int) -> bytes:
        if not self._rows[number, -1]:
            raise InputError(f"{self.shown(number)}: {self.problem(number)}")
        try:
            blocks = self._blocks()
            return blocks.whole(self._names[number], *self._where(number, blocks))
        except OSError as error:
            raise InputError(f"{self.shown(number)}: {error.strerror}") from None

    def _where(self, number: int, blocks: Blocks) -> tuple[int, int, Sequence[int], Tail | None]:
        """Of a file: size, start, stored sizes of its blocks, and its tail."""
        size, _, start, first, position, stored, offset, _ = self._rows[number].tolist()
        count = size // blocks.block_size
        tail = Tail(position, stored, offset) if stored >= 0 else None
        if not tail and size % blocks.block_size:
            count += 1
        return size, start, self._sizes[first : first + count], tail

    def _blocks(self) -> Blocks:
        """The file, opened by this process. Raises: InputError if it is not the one that was indexed."""
        opened = self._opened
        if opened and opened[0] == os.getpid():
            return opened[1]
        blocks = Blocks(self.file, self.source)
        if blocks.file.identity != self._identity:
            blocks.close()
            raise InputError(f"{self.source}: changed while it was in use; start again")
        self._opened = os.getpid(), blocks  # at once: several threads may be here
        return blocks
