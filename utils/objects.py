"""The objects below a URL, read where they are, each kept on this node's disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils import array_file, storage
from utils.errors import InputError
from utils.object_cache import Cache
from utils.squashfs_once import locked, say
from utils.storage import Info
from utils.tree import LARGEST, TOO_LARGE, Names, matching

FORMAT = 1  # of the manifest
ARRAYS = ("names", "ends", "sizes", "stamps", "checksums")


class Objects:
    """A `Tree` over a prefix. What there was is listed once, into `manifest`, and read as it was then.

    A spawned process is sent paths and the fingerprint, and loads the manifest.

    cache: the folder of what is kept, see `object_cache`
    fingerprint: of the manifest, if it was loaded by another process

    Raises: InputError if nothing is below the prefix; as `storage.listing`.
    """

    def __init__(self, url: str, manifest: Path, cache: Path, fingerprint: str | None = None) -> None:
        self.url, self._manifest, self._cache = url.rstrip("/"), manifest, Cache(cache)
        found = _load(self.url, manifest)
        self._names = Names(found["names"], found["ends"])
        self._sizes, self._stamps, self._checksums = found["sizes"], found["stamps"], found["checksums"]
        self.fingerprint = _fingerprint(found)
        if fingerprint not in (None, self.fingerprint):
            raise InputError(f"{url}: its list {manifest} changed while it was in use; start again")

    def __reduce__(self) -> tuple[type[Objects], tuple[Any, ...]]:
        return Objects, (self.url, self._manifest, self._cache.folder, self.fingerprint)

    def __str__(self) -> str:
        return self.url

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        return self._names[number]

    def shown(self, number: int) -> str:
        return storage.join(self.url, self._names[number])

    def stamp(self, number: int) -> tuple[int, int]:
        return int(self._sizes[number]), int(self._stamps[number])

    def find(self, folder: str = "", suffixes: Sequence[str] = (), *, deep: bool = True) -> np.ndarray:
        return matching(self._names, folder, suffixes, deep)

    def problem(self, number: int) -> str | None:
        return TOO_LARGE if self._sizes[number] > LARGEST else None

    def ahead(self, numbers: Sequence[int]) -> None:
        self._cache.ahead([self._info(number) for number in numbers if not self.problem(number)])

    def read(self, number: int) -> bytes:
        if problem := self.problem(number):
            raise InputError(f"{self.shown(number)}: {problem}")
        return self._cache.read(self._info(number))

    def _info(self, number: int) -> Info:
        checksum = int(self._checksums[number])
        return Info(self.shown(number), *self.stamp(number), None if checksum < 0 else checksum)


def _load(url: str, manifest: Path) -> dict[str, np.ndarray]:
    """What was below a URL when `manifest` was made, which is done if need be."""
    key = f"{FORMAT} {url}"
    if found := array_file.load(manifest, key):
        return found
    with locked(manifest, f"lists {url} as"):
        if found := array_file.load(manifest, key):
            return found
        say(f"listing {url}")
        objects = storage.listing(url)
        if not objects:
            raise InputError(f"{url}: nothing below it; give a folder of a bucket, or an archive")
        numbers = [(of.size, of.stamp, -1 if of.crc32c is None else of.crc32c) for of in objects]
        columns = zip(ARRAYS[2:], np.array(numbers, dtype=np.int64).T.copy(), strict=True)
        names = Names.arrays(of.url[len(url) + 1 :] for of in objects)
        array_file.save(manifest, key, {}, names | dict(columns))
    return array_file.load(manifest, key) or _load(url, manifest)


def _fingerprint(found: dict[str, np.ndarray]) -> str:
    """Of names, sizes and contents: what was written again as it was is the same."""
    contents = np.where(found["checksums"] < 0, found["stamps"], found["checksums"])
    digest = hashlib.sha256()
    for array in (found["names"], found["ends"], found["sizes"], contents):
        digest.update(array.tobytes())
    return digest.hexdigest()
