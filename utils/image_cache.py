"""The images of a tree as pixels: decoded each time they are asked for, or once, into a file that is mapped.

A cache is a folder, named after the tree's fingerprint, built under another name and renamed when it is whole:
    pixels      every image as (H, W, 3) uint8, one after the other
    index.npz   sizes: (N, 2) int32, height and width
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from utils import files, images, paths, storage
from utils.chunks import in_chunks
from utils.errors import EnvironmentProblem, InputError, message
from utils.tree import Tree

FORMAT = 1  # raise it when `images.decode` gives other pixels


class Images(Protocol):
    """Images, numbered from 0."""

    def __len__(self) -> int: ...

    def shown(self, index: int) -> str:
        """The file, for messages."""

    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, RGB. Raises: InputError naming a file that cannot be decoded."""

    def ahead(self, indices: Sequence[int]) -> None:
        """See `Tree.ahead`."""

    @property
    def same_size(self) -> tuple[int, int] | None:
        """Height and width of all images, if that is known without decoding them and they are the same."""


def of(tree: Tree, folder: str | None, workers: int) -> Images:
    """The PNG and JPEG images of `tree`, from their cache in `folder`; without a folder they are decoded each time.

    If need be the cache is built first, by `workers` processes, and other ranks of the node wait.

    Raises: InputError when there is no image, one cannot be decoded, or a cache is damaged; EnvironmentProblem when
    `folder` is not this user's alone or has not enough space; Stopped when a signal asks for the end.
    """
    decoded = Decoded(tree)
    if folder is None:
        return decoded
    if storage.is_url(folder):
        raise InputError(f"data.cache={folder}: pixels are mapped from a file; give a folder on a disk")
    root = Path(folder).expanduser()
    paths.make_private(root)
    place = root / f"{tree.fingerprint[:16]}-{FORMAT}"
    with files.lock(root / f".{place.name}.lock"):
        if not place.exists():
            _build(decoded, place, workers)
    return Cached(decoded, place)


class Decoded:
    """Every PNG and JPEG of `tree`, in the order of paths, decoded anew.

    Raises: InputError when there is none, or one cannot be read, such as a link to nothing.
    """

    same_size = None

    def __init__(self, tree: Tree) -> None:
        self.tree, self.numbers = tree, tree.find(suffixes=images.SUFFIXES)
        if not len(self.numbers):
            raise InputError(f"{tree}: no PNG or JPEG image in it or below; check data.unlabeled")
        for number in self.numbers.tolist():
            if problem := tree.problem(number):
                raise InputError(f"{tree.shown(number)}: {problem}; remove it")

    def __len__(self) -> int:
        return len(self.numbers)

    def shown(self, index: int) -> str:
        return self.tree.shown(int(self.numbers[index]))

    def ahead(self, indices: Sequence[int]) -> None:
        self.tree.ahead(self.numbers[list(indices)].tolist())

    def pixels(self, index: int) -> np.ndarray:
        return np.asarray(images.decode(self.tree.read(int(self.numbers[index])), self.shown(index)))


class Cached:
    """What `of` has built in `place`. A forked process shares the mapping, a spawned one maps the file itself.

    Raises: InputError when the cache is not that of as many images, or is cut.
    """

    def __init__(self, decoded: Decoded, place: Path) -> None:
        self.decoded, self.place = decoded, place
        try:
            with np.load(place / "index.npz", allow_pickle=False) as index:
                sizes = index["sizes"].astype(np.int64)
            ends = np.cumsum(3 * sizes.prod(1))
            if len(sizes) != len(decoded) or (place / "pixels").stat().st_size != ends[-1]:
                raise ValueError("not as long as its index says")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{place}: damaged cache of {decoded.tree} ({error}); remove this folder") from None
        self.sizes, self.ends = sizes, ends
        self.same_size = (int(sizes[0, 0]), int(sizes[0, 1])) if (sizes == sizes[0]).all() else None

    def __reduce__(self) -> tuple[type[Cached], tuple[Decoded, Path]]:
        return Cached, (self.decoded, self.place)

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def _mapped(self) -> np.ndarray:
        return np.memmap(self.place / "pixels", np.uint8, "c").view(np.ndarray)  # what is written stays in memory

    def shown(self, index: int) -> str:
        return self.decoded.shown(index)

    def ahead(self, indices: Sequence[int]) -> None:
        pass

    def pixels(self, index: int) -> np.ndarray:
        height, width = self.sizes[index].tolist()
        end = int(self.ends[index])
        return self._mapped[end - 3 * height * width : end].reshape(height, width, 3)


def _build(decoded: Decoded, place: Path, workers: int) -> None:
    prefix = f".{place.name}.{socket.gethostname()}."
    for left in place.parent.glob(f"{prefix}*"):  # by a process of this node that was killed: we hold the lock
        shutil.rmtree(left)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        sizes = np.array(
            in_chunks(partial(_measure, decoded), len(decoded), f"cache: measure {decoded.tree}", workers),
            dtype=np.int32,
        )
        ends = np.cumsum(3 * sizes.astype(np.int64).prod(1))
        if (free := files.free_space(temporary)) < ends[-1]:
            gib = f"{ends[-1] / 2**30:.3f} GiB, {place.parent} has {free / 2**30:.3f} GiB free"
            raise EnvironmentProblem(f"disk full: the cache of {decoded.tree} needs {gib}")
        (temporary / "pixels").touch()
        in_chunks(
            partial(_write, decoded, temporary / "pixels", ends), len(decoded), f"cache: decode {decoded.tree}", workers
        )
        with open(temporary / "pixels", "rb") as file:
            os.fsync(file.fileno())
        files.write_atomic(temporary / "index.npz", lambda file: np.savez(file, sizes=sizes))
        temporary.rename(place)
    except OSError as error:
        if not place.exists():  # on a shared disk another node, where our lock does not hold, may have been first
            raise EnvironmentProblem(f"{place}: the cache cannot be made: {message(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _measure(decoded: Decoded, chunk: range) -> list[tuple[int, int]]:
    """Height and width of each image."""
    found = []
    decoded.ahead(chunk)
    for index in chunk:
        size, problem = images.check(decoded.tree.read(int(decoded.numbers[index])), decoded.shown(index))
        if size is None:
            raise InputError(f"{decoded.shown(index)}: {problem}")
        found.append(size[::-1])
    return found


def _write(decoded: Decoded, file: Path, ends: np.ndarray, chunk: range) -> range:
    """Each image into its place, which is known beforehand so that several processes can write."""
    decoded.ahead(chunk)
    with open(file, "r+b") as opened:
        for index in chunk:
            pixels = decoded.pixels(index).tobytes()
            opened.seek(int(ends[index]) - len(pixels))
            opened.write(pixels)
    return chunk
