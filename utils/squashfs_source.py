"""Where the bytes of an archive come from: a file on a disk, or an object of a bucket."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from utils import storage
from utils.errors import InputError
from utils.storage import Info, Part

NEAR = 4 << 20  # bytes of an object that are read for some bytes of its tables: these are read on and on
KEPT = 8  # such blocks


class File:
    """Raises: InputError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
        self.identity = _identity(os.fstat(self.descriptor))
        self.size = self.identity[0]

    def read(self, size: int, position: int) -> bytes:
        """Fewer bytes if the file has no more."""
        return os.pread(self.descriptor, size, position)

    near = read

    def ahead(self, spans: Iterable[tuple[int, int]]) -> None:
        """Nothing: the system reads ahead."""

    def close(self) -> None:
        os.close(self.descriptor)


class Object:
    """Reads exactly what is asked for, or has it from `ahead`; of tables, by `near`, large blocks."""

    def __init__(self, of: Info) -> None:
        self.of, self.size, self.identity = of, of.size, identity(of)
        self._block = lru_cache(KEPT)(self._read_block)
        self._ahead: tuple[list[int], list[bytes]] = [], []  # starts and contents

    def read(self, size: int, position: int) -> bytes:
        end = min(position + size, self.size)
        starts, contents = self._ahead
        place = bisect_right(starts, position) - 1
        if place >= 0 and end <= starts[place] + len(contents[place]):
            return contents[place][position - starts[place] : end - starts[place]]
        return storage.read(self.of, position, end)

    def near(self, size: int, position: int) -> bytes:
        end = min(position + size, self.size)
        blocks = range(position // NEAR, -(-end // NEAR))
        content = b"".join(self._block(number) for number in blocks)
        return content[position - blocks.start * NEAR : end - blocks.start * NEAR]

    def _read_block(self, number: int) -> bytes:
        return storage.read(self.of, number * NEAR, min((number + 1) * NEAR, self.size))

    def ahead(self, spans: Iterable[tuple[int, int]]) -> None:
        """Get these, each from a start to an end, all at once; what was got before is forgotten."""
        wanted = sorted({span for span in spans if span[1] <= self.size})
        contents = storage.read_many([Part(self.of, *span) for span in wanted])
        self._ahead = [start for start, _ in wanted], contents

    def close(self) -> None:
        pass


def opened(archive: Path | Info) -> File | Object:
    return Object(archive) if isinstance(archive, Info) else File(archive)


def identity(archive: Path | Info) -> tuple[int, int]:
    """What shows, without reading it, that a file is the one that was indexed: size, and mtime or stamp."""
    return (archive.size, archive.stamp) if isinstance(archive, Info) else _identity(os.stat(archive))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def shown(archive: Path | Info) -> str:
    """The path or URL for messages."""
    return archive.url if isinstance(archive, Info) else str(archive)
