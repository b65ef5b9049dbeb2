"""Hashes of files, computed by a thread while this process does something else, such as importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from utils import files

Identity = tuple[int, int, int, int]
_begun: dict[Identity, Future[str]] = {}


def begin(paths: Iterable[Path]) -> None:
    """Start hashing the files, in this order: on a network file system reading them is most of it."""
    pool = ThreadPoolExecutor(1, "hashing")
    for path in paths:
        _begun[_identity(path)] = pool.submit(files.sha256, path)
    pool.shutdown(wait=False)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content: begun before, if the file is the same since, else computed now."""
    begun = _begun.get(_identity(path))
    return begun.result() if begun else files.sha256(path)


def _identity(path: Path) -> Identity:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
