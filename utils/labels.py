"""The labelled set: images, boxes and classes of its splits, read and checked once, then cached.

    root/[labeled/]{training,validation}/images/<id>.JPEG, or any of utils.images.SUFFIXES
    root/[labeled/]{training,validation}/labels/<id>.yml with
        bboxes: [[xmin, ymin, xmax, ymax], ...] in pixels
        labels: [class name, ...]
        image_size: [width, height], which may be left out

An image whose lists are empty is a negative. Boxes are kept exactly as they are written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np

from utils import files, images, label_files, log
from utils.errors import InputError
from utils.shared_config import OnError

FORMAT = 2  # of the cache; raise it with its content or with a check
ARRAYS = ("ids", "sizes", "offsets", "boxes", "labels")
WORDS = ("classes", "files", "problems")
# A damaged cache is a stale one; RuntimeError is zipfile's for flags that only a flipped bit can have set.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)
SHOWN = 50  # lines of an error


@dataclass(frozen=True)
class LabelIndex:
    """One split. Image i is `root/split/files[i]`; its boxes are rows offsets[i] to offsets[i + 1]."""

    root: Path
    split: str
    classes: tuple[str, ...]  # labels 1..C in this order; 0 is background
    ids: np.ndarray  # (N,) int64, from the file names, ascending
    files: tuple[str, ...]
    sizes: np.ndarray  # (N, 2) int64: width, height
    offsets: np.ndarray  # (N + 1,) int64
    boxes: np.ndarray  # (M, 4) float64: xmin, ymin, xmax, ymax in pixels
    labels: np.ndarray  # (M,) int64
    problems: tuple[str, ...]  # what is left out, each with file and reason

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, i: int) -> Path:
        return self.root / self.split / self.files[i]

    def target(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (k, 4) float64 and labels (k,) int64 of image i."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return self.boxes[rows], self.labels[rows]


def load(root: Path, split: str, *, classes: Sequence[str] | None, on_error: OnError, cache: Path) -> LabelIndex:
    """One split; see `load_splits`."""
    return load_splits(root, {split: cache}, classes=classes, on_error=on_error)[0]


def load_splits(
    root: Path, caches: Mapping[str, Path], *, classes: Sequence[str] | None, on_error: OnError
) -> list[LabelIndex]:
    """The splits that are keys of `caches`, each from its cache file if no label or image has changed since.

    Args:
        classes: in the order of their labels; None: from `classes.txt` beside the splits, else the sorted
            names in the training labels.
        on_error: `error` raises when anything is unusable; `skip` leaves out exactly that (a box, or an image
            with its label) and keeps its description in `problems`.

    Raises: InputError listing every problem of all splits, or when a split is missing or has nothing usable.
    """
    root = Path(root)
    if not any((root / split).is_dir() for split in caches) and (root / "labeled").is_dir():
        root = root / "labeled"
    if classes is None and (root / "classes.txt").is_file():
        classes = read_classes(root / "classes.txt")
    indexes = []
    for split, cache in caches.items():
        if classes is None and split != "training":
            classes = _training_names(root)
        with files.lock(cache.with_suffix(".lock")):
            indexes.append(_index(root, split, classes, cache))
        classes = indexes[-1].classes
    if any(index.problems for index in indexes):
        listing = _listing(root, indexes)
        if on_error == "error":
            raise InputError(f"{listing}\nCorrect them, or leave them out with data.on_error=skip.")
        log.warning(f"left out: {listing}")
    for index in indexes:
        if not len(index):
            raise InputError(f"{root / index.split}: none of its images is usable")
    return indexes


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names of a text file, one a line. Raises: InputError."""
    try:
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"classes {path}: {error}") from None
    if not names or len(set(names)) != len(names):
        raise InputError(f"classes {path}: expected one distinct name a line, got {len(names)} names")
    for name in names:
        if not label_files.is_class_name(name):
            raise InputError(f"classes {path}: {brief(name)}: at most {label_files.LONGEST_NAME} printable characters")
    return names


def _listing(root: Path, indexes: Sequence[LabelIndex]) -> str:
    problems = [problem for index in indexes for problem in index.problems]
    lines = [f"{root}: {len(problems)} unusable images, labels or boxes", *problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more")
    counts = [(index.path(i), len(index.target(i)[1])) for index in indexes for i in range(len(index))]
    if empty := [str(path.relative_to(root)) for path, count in counts if count == 0]:
        lines.append(f"{len(empty)} images without a usable box are negatives, no problem: {brief(empty)}")
    return "\n  ".join(lines)


def _training_names(root: Path) -> tuple[str, ...]:
    texts = label_files.scan(root, "training", "labels", label_files.YAML_SUFFIXES)
    return label_files.class_names(label_files.read(root, "training", texts))


def _index(root: Path, split: str, classes: Sequence[str] | None, cache: Path) -> LabelIndex:
    """The split with its problems, from `cache` if that shows the same files."""
    pictures = label_files.scan(root, split, "images", images.SUFFIXES)
    texts = label_files.scan(root, split, "labels", label_files.YAML_SUFFIXES)
    if not pictures:
        raise InputError(f"{root / split / 'images'}: no images ({', '.join(images.SUFFIXES)})")
    fingerprint = hashlib.sha256(json.dumps([FORMAT, split, classes, pictures, texts]).encode()).hexdigest()
    with contextlib.suppress(*UNREADABLE):
        if content := _saved(cache, fingerprint):
            return LabelIndex(root=root, split=split, **content)
    log.info(f"{root / split}: reading {len(texts)} labels, checking {len(pictures)} images")
    index = _build(root, split, classes, pictures, texts)
    arrays = {name: getattr(index, name) for name in ARRAYS}
    words = np.array(json.dumps({name: getattr(index, name) for name in WORDS}))
    files.write_atomic(cache, lambda file: np.savez(file, fingerprint=np.array(fingerprint), words=words, **arrays))
    return index


def _saved(cache: Path, fingerprint: str) -> dict[str, Any] | None:
    """What a cache holds if it is of these files; nothing of a file that somebody else could have written."""
    status = cache.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o002:
        return None
    with np.load(cache, allow_pickle=False) as saved:
        if saved["fingerprint"].item() != fingerprint:
            return None
        words = {name: tuple(value) for name, value in json.loads(saved["words"].item()).items()}
        return words | {name: saved[name] for name in ARRAYS}


def _build(
    root: Path, split: str, classes: Sequence[str] | None, pictures: label_files.Scan, texts: label_files.Scan
) -> LabelIndex:
    documents = label_files.read(root, split, texts)
    names = tuple(classes or label_files.class_names(documents))
    if not names:
        raise InputError(f"{root / split}: its labels name no class; give data.classes")
    examples, problems = label_files.check(root, split, names, pictures, documents)
    counts = [len(example.labels) for example in examples]
    log.info(f"{root / split}: {len(examples)} images, {counts.count(0)} of them without a box (negatives)")
    return LabelIndex(
        root=root,
        split=split,
        classes=names,
        ids=np.array([example.id for example in examples], dtype=np.int64),
        files=tuple(example.file for example in examples),
        sizes=np.array([example.size for example in examples], dtype=np.int64).reshape(-1, 2),
        offsets=np.cumsum([0, *counts], dtype=np.int64),
        boxes=np.array(list(chain.from_iterable(example.boxes for example in examples)), float).reshape(-1, 4),
        labels=np.array(list(chain.from_iterable(example.labels for example in examples)), np.int64),
        problems=tuple(problems),
    )
