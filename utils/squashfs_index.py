"""Where each file of an archive lies, found once and kept beside the staged data.

Half a million files are 70 MB in four arrays, which forked loader processes share, and no object per file.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import array_file
from utils.errors import InputError
from utils.squashfs_reader import PATH_MAX, Entry, Reader
from utils.squashfs_source import shown
from utils.storage import Info
from utils.tree import LARGEST, Names

FORMAT = 2  # of the cache; raise it with its content or with a check
ARRAYS = ("names", "ends", "rows", "sizes")
COLUMNS = 8  # size, mtime, start, first, tail's position, stored size (-1: no tail) and offset, whether it can be read
MOST = 1 << 29  # bytes of names, and of block lists: of archives of 10 million files and of 15 TB
MOST_LINKS = 40  # that one path may lead through, as in Linux
MOST_STEPS = 1 << 22  # from name to name, for all links together: a few seconds


@dataclass(frozen=True)
class Index:
    """Files and links in the order of their paths."""

    names: np.ndarray  # uint8: the paths one after another
    ends: np.ndarray  # (N + 1,) int64: path i is names[ends[i]:ends[i + 1]]
    rows: np.ndarray  # (N, COLUMNS) int64; of a link to a file inside, those of the file
    sizes: np.ndarray  # uint32: of file i's blocks those from rows[i]'s `first` on, as stored, with their flag


def load(archive: Path | Info, digest: str, cache: Path) -> Index:
    """The index of the archive with this sha256, from `cache`, which is made if need be.

    Raises: InputError if the archive is damaged or holds what `squashfs_reader.danger` refuses.
    """
    fingerprint = f"{FORMAT} {digest}"
    if saved := array_file.load(cache, fingerprint):
        return Index(**saved)
    index = build(archive)
    array_file.save(cache, fingerprint, {}, {name: getattr(index, name) for name in ARRAYS})
    return index


def build(archive: Path | Info) -> Index:
    """The index, from the archive itself. Raises: InputError, see `load`."""
    rows, sizes, names = array("q"), array("I"), list[str]()
    links, folders = dict[str, str](), {""}
    with Reader(archive) as reader:
        lists: dict[int, int] = {}  # hard links have one inode and one list of blocks
        room = min(MOST, reader.inode_bytes) // sizes.itemsize
        length = 0
        for entry in reader.safe_walk():
            if entry.kind == "directory":
                folders.add(entry.path)
                continue
            names.append(entry.path)
            length += len(entry.path) + len(entry.target)
            if entry.kind == "symlink":
                links[entry.path] = entry.target
                rows.extend((len(os.fsencode(entry.target)), entry.mtime, 0, 0, 0, -1, 0, 0))
            else:
                rows.extend(_row(reader, entry, lists, sizes))
            if len(sizes) > room or length > MOST:
                raise InputError(
                    f"{shown(archive)}: damaged squashfs archive: more names or blocks than it has room for"
                )
    table = np.frombuffer(rows, dtype=np.int64).reshape(-1, COLUMNS).copy()
    to_folders = _follow(shown(archive), names, links, folders, table) if links else set()
    order = sorted(set(range(len(names))) - to_folders, key=names.__getitem__)
    paths = Names.arrays(names[number] for number in order)
    return Index(**paths, rows=table[order], sizes=np.frombuffer(sizes, dtype=np.uint32))


def _row(reader: Reader, entry: Entry, lists: dict[int, int], sizes: array[int]) -> Sequence[int]:
    if entry.size > LARGEST:
        return min(entry.size, 2**63 - 1), entry.mtime, 0, 0, 0, -1, 0, 0
    start, _, _, reference, _ = entry.where
    first = lists.setdefault(reference, len(sizes))
    if first == len(sizes):
        for some in reader.sizes(entry):
            sizes.frombytes(some)
    tail = reader.tail(entry) or (0, -1, 0)
    return entry.size, entry.mtime, min(start, 2**63 - 1), first, *tail, 1


def _follow(
    archive: str, names: Sequence[str], links: Mapping[str, str], folders: Set[str], table: np.ndarray
) -> set[int]:
    """Give links to files the rows of these files; those to nothing keep their own. Returns which lead to folders.

    Raises: InputError if they lead through more than an honest archive's.
    """
    numbers = {name: number for number, name in enumerate(names)}
    to_folders = set()
    budget = iter(range(MOST_STEPS))
    for name in links:
        target = _target(name, links, numbers, budget)
        if next(budget, None) is None:
            raise InputError(f"{archive}: damaged squashfs archive: its links lead on and on; pack plain files")
        if target in folders:
            to_folders.add(numbers[name])
        elif target in numbers:
            table[numbers[name]] = table[numbers[target]]
    return to_folders


def _target(name: str, links: Mapping[str, str], numbers: Mapping[str, int], budget: Iterator[int]) -> str | None:
    """Where a link leads, as a path without links; None if it goes round in circles, on from a file or too far."""
    here, hops = "", 0
    ahead: list[str] = name.split("/")[::-1]
    while ahead:
        step = ahead.pop()
        if next(budget, None) is None:
            return None
        if here in numbers:
            return None
        if step == "..":
            here = here.rpartition("/")[0]
        elif step not in ("", "."):
            path = f"{here}/{step}" if here else step
            hops += path in links
            if hops > MOST_LINKS or len(path) > PATH_MAX:
                return None
            if path in links:
                ahead += links[path].split("/")[::-1]
            else:
                here = path
    return here
