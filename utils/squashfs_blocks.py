"""A squashfs 4.0 file as checked, decompressed blocks: what lies below inodes and directories."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from utils import squashfs_source
from utils.errors import InputError
from utils.squashfs_codecs import decompressor
from utils.storage import Info

MAGIC = 0x73717368
SUPERBLOCK = struct.Struct("<5I6H8Q")
METADATA_BLOCK = 8192
UNCOMPRESSED = 1 << 24  # flag in a data block's size


class Tail(NamedTuple):
    """The end of a file that shares a block, a fragment, with the ends of others."""

    position: int  # of the shared block
    stored: int  # its size with the UNCOMPRESSED flag
    offset: int  # in the shared block when that is decompressed


class Damaged(InputError):
    """An archive that says what cannot be. Made of its text alone, as a loader process's errors are made again."""

    what = ""


class Blocks:
    """An open archive file. Nothing in it is trusted: every position and size is checked.

    Raises: InputError if the file is missing, is not squashfs 4.0, is cut short, or is compressed with
    something this machine cannot decompress; the methods raise it, with the file's name, for damage.
    """

    def __init__(self, path: Path | Info, source: Path | str | None = None) -> None:
        self.path = source or squashfs_source.shown(path)  # for messages
        self.file = squashfs_source.opened(path)
        self.metadata = lru_cache(1024)(self._read_metadata)
        self._fragment = lru_cache(8)(self._read_fragment)
        try:
            self._read_superblock()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.close()

    def fail(self, what: str) -> NoReturn:
        error = Damaged(f"{self.path}: damaged squashfs archive: {what}; copy or build it again")
        error.what = what
        raise error

    def whole(self, name: str, size: int, start: int, sizes: Sequence[int], tail: Tail | None) -> bytes:
        """A file's content at once, see `content`; what is stored as it is, by one read.

        `sizes` is a memoryview of 32-bit numbers, one a block.
        """
        try:
            if sizes and not tail and self._are_raw(sizes, size):
                return self._read(start, size)
            if tail and not sizes and tail.offset + size <= tail.stored ^ UNCOMPRESSED <= self.block_size:
                return self._read(tail.position + tail.offset, size)
        except Damaged as error:
            self.fail(f"the file {name!r}: {error.what}")
        return b"".join(self.content(name, size, start, sizes, tail))

    def ahead(self, contents: Sequence[tuple[int, int, Sequence[int], Tail | None]]) -> None:
        """These will be read next by `whole`: size, start, sizes, tail."""
        spans = [(start, start + sum(size & (UNCOMPRESSED - 1) for size in sizes)) for _, start, sizes, _ in contents]
        tails = {tail for *_, tail in contents if tail}
        spans += [(tail.position, tail.position + (tail.stored & (UNCOMPRESSED - 1))) for tail in tails]
        self.file.ahead([span for span in spans if span[0] < span[1]])

    def _are_raw(self, sizes: Sequence[int], size: int) -> bool:
        """Whether all blocks of a file of `size` bytes are stored as they are."""
        if sizes[-1] != (size - 1) % self.block_size + 1 | UNCOMPRESSED:
            return False
        raw = self.block_size | UNCOMPRESSED
        return len(sizes) == 1 or all(stored == raw for stored in sizes[:-1])

    def content(self, name: str, size: int, start: int, sizes: Iterable[int], tail: Tail | None) -> Iterator[bytes]:
        """A file of `size` bytes in chunks of at most the block size: its blocks from byte `start` on, then its tail.

        `sizes` are the blocks' stored sizes with the UNCOMPRESSED flag; 0 is a hole.
        """
        left = size
        try:
            for stored in sizes:
                expected = min(left, self.block_size)
                chunk = self._data(start, stored, expected) if stored else bytes(expected)
                if len(chunk) != expected:
                    self.fail(f"a block of {len(chunk)} bytes instead of {expected}")
                start += stored & (UNCOMPRESSED - 1)
                left -= expected
                yield chunk
            if tail:
                chunk = self._fragment(tail.position, tail.stored)[tail.offset : tail.offset + left]
                if len(chunk) != left:
                    self.fail("its end is missing")
                yield chunk
        except Damaged as error:
            self.fail(f"the file {name!r}: {error.what}")

    def tail(self, index: int, offset: int) -> Tail:
        """The tail at `offset` in the fragment with this index."""
        if index >= self._fragments:
            self.fail(f"fragment {index} of {self._fragments}")
        table = int.from_bytes(self._read(self._fragment_table + index // 512 * 8, 8, table=True), "little")
        position, stored, _ = struct.unpack("<QII", Cursor(self, table, index % 512 * 16).read(16))
        if position > self.size:
            self.fail(f"fragment {index} at byte {position} of {self.size}")
        return Tail(position, stored, offset)

    def _read_superblock(self) -> None:
        data = self.file.read(SUPERBLOCK.size, 0)
        if len(data) < SUPERBLOCK.size or int.from_bytes(data[:4], "little") != MAGIC:
            raise InputError(f"{self.path}: not a squashfs archive; give one made by mksquashfs or a folder")
        (_, _, _, self.block_size, self._fragments, method, block_log, _, _, *version, self.root, self.size,
         _, _, self.inodes, self.directories, self._fragment_table, _) = SUPERBLOCK.unpack(data)  # fmt: skip
        if version != [4, 0]:
            raise InputError(f"{self.path}: squashfs version {version}, only 4.0 can be read; repack it")
        if self.file.size < self.size:
            raise InputError(f"{self.path}: cut short: {self.file.size} bytes of {self.size}; copy it again")
        if not 12 <= block_log <= 20 or self.block_size != 1 << block_log:
            self.fail(f"block size {self.block_size}")
        if not self.inodes < self.directories < self.size:
            self.fail("its tables lie outside the file")
        try:
            self._decompress = decompressor(method)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def _read(self, position: int, size: int, *, table: bool = False) -> bytes:
        if position + size > self.size:
            self.fail(f"it points to byte {position + size} of {self.size}")
        data = self.file.near(size, position) if table else self.file.read(size, position)
        if len(data) != size:
            self.fail(f"it ended while byte {position} was read")
        return data

    def _unpack(self, position: int, data: bytes, limit: int) -> bytes:
        try:
            return self._decompress(data, limit)
        except ValueError as error:
            self.fail(f"the block at byte {position}: {error}")

    def _read_metadata(self, position: int) -> tuple[bytes, int]:
        """One metadata block and the position of the next."""
        header = int.from_bytes(self._read(position, 2, table=True), "little")
        size = header & 0x7FFF
        data = self._read(position + 2, size, table=True)
        if not header & 0x8000:
            data = self._unpack(position, data, METADATA_BLOCK)
        if not 0 < len(data) <= METADATA_BLOCK:
            self.fail(f"the metadata block at byte {position} has {len(data)} bytes")
        return data, position + 2 + size

    def _data(self, position: int, size: int, limit: int) -> bytes:
        """The data block at `position`; `size` is its stored size with the UNCOMPRESSED flag."""
        stored = size & (UNCOMPRESSED - 1)
        if stored > self.block_size:
            self.fail(f"a block of {stored} bytes at byte {position}")
        data = self._read(position, stored)
        return data if size & UNCOMPRESSED else self._unpack(position, data, limit)

    def _read_fragment(self, position: int, stored: int) -> bytes:
        return self._data(position, stored, self.block_size)


class Cursor:
    """Reads on through metadata, from one block of at most 8 KiB into the next, at `following`."""

    __slots__ = ("_blocks", "_data", "_offset", "following")

    def __init__(self, blocks: Blocks, position: int, offset: int) -> None:
        self._blocks, self._offset = blocks, offset
        self._data, self.following = blocks.metadata(position)
        if offset > len(self._data):
            blocks.fail("an offset points behind its metadata block")

    def read(self, size: int) -> bytes:
        end = self._offset + size
        while end > len(self._data):
            more, self.following = self._blocks.metadata(self.following)
            self._data = self._data[self._offset :] + more
            self._offset, end = 0, size
        piece = self._data[self._offset : end]
        self._offset = end
        return piece
