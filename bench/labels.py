"""The label index: made, loaded and asked, against reading the label files with PyYAML, as label code usually does.

    python -m bench.labels [--files 30000] [--rounds 3]

The files are as DL-SP22's: dumps of one or two boxes, about 138 bytes. PyYAML's own loaders get one in thirty of them,
as they would take minutes. CPU time, except for loading an index: there the limit is what somebody waits.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from bench.measure import Row, arguments, race, report, seconds, wall
from utils import label_files, labels
from utils.archive import Archive
from utils.files import sha256
from utils.label_files import Split
from utils.labels import LabelIndex
from utils.sample_data import pack
from utils.sample_scenes import scene
from utils.tree import Folder, Tree

LIMIT = 0.010  # s to load an index
LOADS = 200  # of the index; their median counts
SHARE = 30  # one in so many files goes to PyYAML
PICTURES = 32  # different ones; the other images are hard links to them
SIDE = 224
CLASSES = ("cup or mug", "bowl", "lamp", "traffic light", "watch")


def write_set(root: Path, files: int) -> None:
    """A training split of `files` images and labels."""
    for kind in ("images", "labels"):
        (root / "training" / kind).mkdir(parents=True)
    pictures = []
    for seed in range(PICTURES):
        file = io.BytesIO()
        scene(np.random.default_rng(seed), SIDE, SIDE, 3)[0].save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    random = np.random.default_rng(0)
    for number in range(1, files + 1):
        count = random.choice([1, 2, 2, 2, 2])
        boxes = np.hstack([random.uniform(0, 100, (count, 2)), random.uniform(101, SIDE, (count, 2))]).round(2)
        content = {
            "bboxes": boxes.tolist(),
            "image_size": [SIDE, SIDE],
            "labels": random.choice(CLASSES, count).tolist(),
        }
        text = yaml.dump(content, Dumper=yaml.CSafeDumper)
        (root / "training" / "labels" / f"{number}.yml").write_text(text)
        image = root / "training" / "images" / f"{number}.JPEG"
        if number <= PICTURES:
            image.write_bytes(pictures[number - 1])
        else:
            os.link(image.with_name(f"{1 + number % PICTURES}.JPEG"), image)


def usual(root: Path, loader: Any, numbers: range, *, pictures: bool = False) -> None:
    """Label by label, and the size of each image, as data sets do."""
    for number in numbers:
        with open(root / "training" / "labels" / f"{number}.yml") as file:
            yaml.load(file, loader)
        if pictures:
            with Image.open(root / "training" / "images" / f"{number}.JPEG") as image:
                assert image.size == (SIDE, SIDE)


def index(tree: Tree, cache: Path) -> LabelIndex:
    return labels.load(tree, "training", classes=None, on_error="error", cache=cache)


def anew(tree: Tree, cache: Path) -> None:
    cache.unlink(missing_ok=True)
    index(tree, cache)


def scan(root: Path) -> list[os.stat_result]:
    """Nothing but the sizes and times of all files."""
    return [entry.stat() for kind in ("images", "labels") for entry in os.scandir(root / "training" / kind)]


class Set(NamedTuple):
    root: Path
    folder: Tree
    archive: Tree
    cache: Path
    files: int
    rounds: int

    @property
    def some(self) -> range:
        return range(1, self.files + 1, SHARE)


def row(of: Set, claim: str, ours: Callable[[], object], peer: Callable[[], object], goal: float | None = None) -> Row:
    """Ours does all files, the peer some."""
    mine, theirs, ratio = race(ours, peer, rounds=of.rounds, clock=time.process_time)
    rates = f"{of.files / mine:,.0f} files/s", f"{len(of.some) / theirs:,.0f} files/s"
    return Row(claim, *rates, ratio * of.files / len(of.some), goal)


def build_rows(of: Set) -> list[Row]:
    def read(tree: Tree) -> None:
        label_files.read(Split(tree, "training", ["training"]))

    safe = partial(usual, of.root, yaml.SafeLoader, of.some)
    full = partial(usual, of.root, yaml.FullLoader, of.some)
    with_images = partial(usual, of.root, yaml.SafeLoader, of.some, pictures=True)
    checked = "index made, images checked; yaml.SafeLoader, Image.open"
    return [
        row(of, "label files read; yaml.SafeLoader", partial(read, of.folder), safe, 5),
        row(of, "label files read; yaml.FullLoader", partial(read, of.folder), full, 5),
        row(of, "the same from an archive; yaml.SafeLoader", partial(read, of.archive), safe, 5),
        row(of, checked, partial(anew, of.folder, of.cache), with_images, 5),
    ]


def load_rows(of: Set) -> list[Row]:
    def load(tree: Tree, cache: Path) -> None:
        assert len(index(tree, cache)) == of.files

    anew(of.folder, in_folder := of.cache.with_name("folder.index"))
    anew(of.archive, of.cache)
    waited = statistics.median(seconds(partial(load, of.archive, of.cache), wall) for _ in range(LOADS))
    ours, bare, ratio = race(partial(load, of.folder, in_folder), partial(scan, of.root), rounds=of.rounds, clock=wall)
    loaded = index(of.archive, of.cache)
    return [
        Row("index of an archive loaded, wall; limit", f"{waited * 1e3:.2f} ms", "10 ms", LIMIT / waited, 1),
        Row("index of a folder, wall; bare stat of all files", f"{ours * 1e3:.0f} ms", f"{bare * 1e3:.0f} ms", ratio),
        row(
            of,
            "target of an image; yaml.SafeLoader",
            lambda: [loaded.target(i) for i in range(of.files)],
            partial(usual, of.root, yaml.SafeLoader, of.some),
        ),
    ]


def main() -> None:
    options = arguments(__doc__, files=30_000, rounds=3)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "set"
        write_set(root, options.files)
        packed = Path(temporary) / "set.sqsh"
        pack(root, packed)
        archive = Archive(packed, sha256(packed), Path(temporary) / "archive.npz")
        of = Set(root, Folder(root), archive, Path(temporary) / "labels.index", options.files, options.rounds)
        sizes = [file.stat().st_size for file in (root / "training" / "labels").iterdir()]
        rows = build_rows(of) + load_rows(of)
    report(f"labels: {options.files} images, label files of {np.mean(sizes):.0f} bytes", rows)


if __name__ == "__main__":
    main()
