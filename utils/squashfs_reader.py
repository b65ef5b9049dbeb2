"""A read-only squashfs 4.0 reader in Python: lists and reads an archive without `unsquashfs` or a mount.

    with Reader("labeled.sqsh") as reader:
        for entry in reader.walk():
            if entry.kind == "file":
                content = b"".join(reader.read(entry))

A hostile or damaged archive raises InputError with its name; it never makes the reader loop or fill
the memory. Format: https://dr-emann.github.io/squashfs/
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError
from utils.squashfs_blocks import METADATA_BLOCK, Blocks, Cursor, Tail
from utils.storage import Info

KINDS = ("directory", "file", "symlink", "block device", "character device", "fifo", "socket")
NO_FRAGMENT = 0xFFFFFFFF
PATH_MAX = 4096


class Entry(NamedTuple):
    """One name in the archive. `path` is relative, with `/`; `where` is the reader's own."""

    path: str
    kind: str  # one of KINDS
    mode: int  # permissions with setuid, setgid and sticky
    mtime: int  # seconds since 1970
    size: int  # bytes of a file, else 0
    target: str  # of a symlink, else ""
    where: tuple[int, ...]


def danger(entry: Entry) -> str | None:
    """Why an entry is refused. A link is safe if it is relative and its `..` stay inside, all at its start.

    Only leading `..` can be counted against the path: after a name, which may be another link, they cannot.
    """
    if entry.kind == "file":
        return "setuid or setgid" if entry.mode & (stat.S_ISUID | stat.S_ISGID) else None
    if entry.kind == "symlink":
        steps = [step for step in entry.target.split("/") if step not in ("", ".")]
        ups = steps.count("..")
        leaves = entry.target.startswith("/") or ups > entry.path.count("/") or ".." in steps[ups:]
        return f"a link that leaves the archive, to {entry.target!r}" if leaves else None
    return None if entry.kind == "directory" else f"a {entry.kind}"


class Reader:
    """An open archive and context manager. Raises: InputError, see `Blocks`."""

    def __init__(self, path: str | Path | Info) -> None:
        self._blocks = Blocks(path if isinstance(path, Info) else Path(path))
        # As many bytes of inodes as can be packed into the table of them: each block takes 3 bytes or more.
        self.inode_bytes = (self._blocks.directories - self._blocks.inodes) // 3 * METADATA_BLOCK

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._blocks.close()

    def safe_walk(self) -> Iterator[Entry]:
        """`walk`, which ends at the first entry that `danger` refuses. Raises: InputError."""
        for entry in self.walk():
            if problem := danger(entry):
                raise InputError(
                    f"{self._blocks.path}: {entry.path!r} is {problem}; refused, pack plain files and folders"
                )
            yield entry

    def walk(self) -> Iterator[Entry]:
        """Every name in the archive but the root; a directory comes before what it holds."""
        blocks = self._blocks
        root = self._inode(blocks.root, "")
        if root.kind != "directory":
            blocks.fail(f"its root is a {root.kind}")
        seen = {blocks.root}
        pending = [root]
        listed, touched = 0, set[int]()
        while pending:
            directory = pending.pop()
            for name, reference in self._names(directory, touched):
                entry = self._inode(reference, f"{directory.path}/{name}" if directory.path else name)
                if entry.kind == "directory":
                    if reference in seen:
                        blocks.fail("its directories are not a tree")
                    seen.add(reference)
                    pending.append(entry)
                yield entry
            # Directories that share one listing would make a small archive all but endless. The 2 and
            # the 1 are for listings that begin in one block and have their first whole name in the next.
            listed += directory.where[2]
            if listed > 2 * METADATA_BLOCK * (1 + len(touched)):
                blocks.fail("its directories share their content")

    def read(self, entry: Entry) -> Iterator[bytes]:
        """The content of a file, in chunks of at most the archive's block size (1 MiB or less)."""
        sizes = (size for some in self.sizes(entry) for (size,) in struct.iter_unpack("<I", some))
        return self._blocks.content(entry.path, entry.size, entry.where[0], sizes, self.tail(entry))

    def tail(self, entry: Entry) -> Tail | None:
        """The end of a file if it shares a block with others."""
        _, fragment, offset, _, _ = entry.where
        if not entry.size % self._blocks.block_size or fragment == NO_FRAGMENT:
            return None
        return self._blocks.tail(fragment, offset)

    def sizes(self, entry: Entry) -> Iterator[bytes]:
        """The stored sizes of a file's blocks, 4 bytes each, some at a time: an archive can claim very many."""
        _, fragment, _, reference, fixed = entry.where
        left = 4 * (entry.size // self._blocks.block_size)
        if entry.size % self._blocks.block_size and fragment == NO_FRAGMENT:
            left += 4
        if left:
            cursor = self._at_inode(reference)
            cursor.read(fixed)
        while left:
            some = cursor.read(min(left, METADATA_BLOCK))
            left -= len(some)
            yield some

    def _at_inode(self, reference: int) -> Cursor:
        """A reference is 48 bits of block position and 16 bits of offset in that block."""
        return Cursor(self._blocks, self._blocks.inodes + (reference >> 16), reference & 0xFFFF)

    def _inode(self, reference: int, path: str) -> Entry:
        if len(path) > PATH_MAX:
            self._blocks.fail(f"a path of {len(path)} characters")
        cursor = self._at_inode(reference)
        number, mode, _, _, mtime, _ = struct.unpack("<4H2I", cursor.read(16))
        if not 1 <= number <= 2 * len(KINDS):  # basic ones, then the same again with extended fields
            self._blocks.fail(f"{path!r} has inode type {number}")
        kind = KINDS[(number - 1) % len(KINDS)]
        size, target = 0, ""
        where: tuple[int, ...] = ()
        if number == 1:
            start, _, listing, offset, _ = struct.unpack("<2I2HI", cursor.read(16))
            where = (start, offset, listing)
        elif number == 8:
            _, listing, start, _, _, offset, _ = struct.unpack("<4I2HI", cursor.read(24))
            where = (start, offset, listing)
        elif number == 2:
            start, fragment, offset, size = struct.unpack("<4I", cursor.read(16))
            where = (start, fragment, offset, reference, 16 + 16)  # the sizes of its blocks follow
        elif number == 9:
            start, size, _, _, fragment, offset, _ = struct.unpack("<3Q4I", cursor.read(40))
            where = (start, fragment, offset, reference, 16 + 40)
        elif kind == "symlink":
            _, length = struct.unpack("<2I", cursor.read(8))
            if not 0 < length <= PATH_MAX:
                self._blocks.fail(f"the symbolic link {path!r} has a target of {length} bytes")
            target = os.fsdecode(cursor.read(length))
        return Entry(path, kind, mode & 0o7777, mtime, size, target, where)

    def _names(self, directory: Entry, touched: set[int]) -> Iterator[tuple[str, int]]:
        """Name and inode reference of what `directory` holds; adds the blocks they are in to `touched`."""
        start, offset, listing = directory.where
        left = listing - 3  # as if `.` and `..` took 3 bytes
        if left <= 0:
            return
        cursor = Cursor(self._blocks, self._blocks.directories + start, offset)
        seen: set[str] = set()
        while left > 0:
            count, block, _ = struct.unpack("<3I", cursor.read(12))
            left -= 12
            for _ in range(count + 1):
                offset, _, _, length = struct.unpack("<4H", cursor.read(8))
                name = os.fsdecode(cursor.read(length + 1))
                left -= 8 + length + 1
                # Two entries of one name are how an archive writes through its own symbolic link.
                if left < 0 or name in (".", "..") or "/" in name or "\0" in name or name in seen:
                    self._blocks.fail(f"the directory entry {name!r}")
                seen.add(name)
                touched.add(cursor.following)
                yield name, block << 16 | offset
