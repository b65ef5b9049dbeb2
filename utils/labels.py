"""The labelled set: images, boxes and classes of its splits, read and checked once, then cached.

    root/[labeled/]{training,validation}/images/<id>.JPEG, or any of utils.images.SUFFIXES
    root/[labeled/]{training,validation}/labels/<id>.yml with
        bboxes: [[xmin, ymin, xmax, ymax], ...] in pixels
        labels: [class name, ...]
        image_size: [width, height], which may be left out

An image whose lists are empty is a negative. Boxes are kept exactly as they are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from reprlib import repr as brief

import numpy as np

from utils import array_file, files, label_checks, label_files, log, storage
from utils.errors import InputError
from utils.label_files import Split
from utils.shared_config import OnError
from utils.tree import Folder, Tree

FORMAT = 3  # of the cache; raise it with its content or with a check
ARRAYS = ("ids", "numbers", "sizes", "offsets", "boxes", "labels")
WORDS = ("classes", "problems")
SHOWN = 50  # lines of an error


@dataclass(frozen=True)
class LabelIndex:
    """One split. Image i is the tree's file numbers[i]; its boxes are rows offsets[i] to offsets[i + 1]."""

    tree: Tree
    split: str
    classes: tuple[str, ...]  # labels 1..C in this order; 0 is background
    ids: np.ndarray  # (N,) int64, from the file names, ascending
    numbers: np.ndarray  # (N,) int64, of the images in the tree
    sizes: np.ndarray  # (N, 2) int64: width, height
    offsets: np.ndarray  # (N + 1,) int64
    boxes: np.ndarray  # (M, 4) float64: xmin, ymin, xmax, ymax in pixels
    labels: np.ndarray  # (M,) int64
    problems: tuple[str, ...]  # what is left out, each with file and reason

    def __len__(self) -> int:
        return len(self.ids)

    def shown(self, i: int) -> str:
        """The path of image i, for messages."""
        return self.tree.shown(int(self.numbers[i]))

    def read(self, i: int) -> bytes:
        """The image file i. Raises: InputError naming it."""
        return self.tree.read(int(self.numbers[i]))

    def ahead(self, indices: Sequence[int]) -> None:
        """These images will be read next, see `Tree.ahead`."""
        self.tree.ahead(self.numbers[list(indices)].tolist())

    def target(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (k, 4) float64 and labels (k,) int64 of image i."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return self.boxes[rows], self.labels[rows]


def load(tree: Tree, split: str, *, classes: Sequence[str] | None, on_error: OnError, cache: Path) -> LabelIndex:
    """One split; see `load_splits`."""
    return load_splits(tree, {split: cache}, classes=classes, on_error=on_error)[0]


def load_splits(
    tree: Tree, caches: Mapping[str, Path], *, classes: Sequence[str] | None, on_error: OnError
) -> list[LabelIndex]:
    """The splits that are keys of `caches`, each from its cache file if no label or image has changed since.

    Of an archive the content decides that; of a folder names, sizes and times.

    Args:
        classes: in the order of their labels; None: from `classes.txt` beside the splits, else the sorted
            names in the training labels.
        on_error: `error` raises when anything is unusable; `skip` leaves out exactly that (a box, or an image
            with its label) and keeps its description in `problems`.

    Raises: InputError listing every problem of all splits, or when a split is missing or has nothing usable.
    """
    indexes = []
    for name, cache in caches.items():
        split = Split(tree, name, caches)
        with files.lock(cache.with_suffix(".lock")):
            indexes.append(_index(split, classes, cache))
        classes = indexes[-1].classes
    if any(index.problems for index in indexes):
        listing = _listing(Split(tree, "training", caches), indexes)
        if on_error == "error":
            raise InputError(f"{listing}\nCorrect them, or leave them out with data.on_error=skip.")
        log.warning(f"left out: {listing}")
    for index in indexes:
        if not len(index):
            raise InputError(f"{Split(tree, index.split, caches)}: none of its images is usable")
    return indexes


def read_classes(path: Path | str) -> tuple[str, ...]:
    """The class names of a text file or object, one a line. Raises: InputError."""
    try:
        file = storage.local(path)
        content = file.read_bytes() if file else storage.read(storage.info(str(path)))
        return label_files.parse_classes(content, str(path))
    except OSError as error:
        raise InputError(f"classes {path}: {error}") from None


def _listing(split: Split, indexes: Sequence[LabelIndex]) -> str:
    problems = [problem for index in indexes for problem in index.problems]
    lines = [f"{split.root}: {len(problems)} unusable images, labels or boxes", *problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more")
    empty = [index.numbers[np.diff(index.offsets) == 0].tolist() for index in indexes]
    if names := [split.short(number) for number in chain.from_iterable(empty)]:
        lines.append(f"{len(names)} images without a usable box are negatives, no problem: {brief(names)}")
    return "\n  ".join(lines)


def _index(split: Split, classes: Sequence[str] | None, cache: Path) -> LabelIndex:
    """The split with its problems, from `cache` if that is of the same files."""
    key, first = _key(split, classes)
    if saved := array_file.load(cache, key):
        words = {name: tuple(saved[name]) for name in WORDS}
        numbers = saved["numbers"] + first
        return LabelIndex(tree=split.tree, split=split.name, **{**saved, **words, "numbers": numbers})
    log.info(f"{split}: reading {len(split.texts)} labels, checking {len(split.pictures)} images")
    index = _build(split, classes)
    arrays = {name: getattr(index, name) for name in ARRAYS} | {"numbers": index.numbers - first}
    array_file.save(cache, key, {name: getattr(index, name) for name in WORDS}, arrays)
    return index


def _key(split: Split, classes: Sequence[str] | None) -> tuple[str, int]:
    """What an index is made of, hashed, and the number that its cache counts numbers of images from.

    In a folder, other files come and go, the cache itself perhaps, and the numbers of images with them.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, split.name, classes]).encode())
    tree = split.tree
    if not isinstance(tree, Folder):
        digest.update(tree.fingerprint.encode())
        return digest.hexdigest(), 0
    first = int(split.pictures[0])
    watched = np.concatenate([split.pictures, split.texts])
    if classes is None:
        watched = np.concatenate([watched, split.classes_file, *([] if split.is_training else [split.training.texts])])
    digest.update((split.pictures - first).tobytes())
    digest.update("\0".join(map(split.short, watched.tolist())).encode(errors="surrogateescape"))
    digest.update(np.array([tree.stamp(number) for number in watched.tolist()]).tobytes())
    return digest.hexdigest(), first


def _build(split: Split, classes: Sequence[str] | None) -> LabelIndex:
    documents = label_files.read(split)
    names = tuple(classes or label_files.class_names(split, documents))
    if not names:
        raise InputError(f"{split}: its labels name no class; give data.classes")
    examples, problems = label_checks.check(split, names, documents)
    counts = [len(example.labels) for example in examples]
    log.info(f"{split}: {len(examples)} images, {counts.count(0)} of them without a box (negatives)")
    return LabelIndex(
        tree=split.tree,
        split=split.name,
        classes=names,
        ids=np.array([example.id for example in examples], dtype=np.int64),
        numbers=np.array([example.number for example in examples], dtype=np.int64),
        sizes=np.array([example.size for example in examples], dtype=np.int64).reshape(-1, 2),
        offsets=np.cumsum([0, *counts], dtype=np.int64),
        boxes=np.array(list(chain.from_iterable(example.boxes for example in examples)), float).reshape(-1, 4),
        labels=np.array(list(chain.from_iterable(example.labels for example in examples)), np.int64),
        problems=tuple(problems),
    )
