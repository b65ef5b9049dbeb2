"""Small labelled sets of real files for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.archives import pack
from utils.archive import Archive
from utils.files import sha256

COLOURS = {"cat": (230, 40, 40), "dog": (40, 90, 230)}


def write_example(folder: Path, number: int, boxes: list[Any], names: list[Any], **keys: Any) -> None:
    """One 64x48 image with a coloured rectangle for every sound box, and its label file."""
    pixels = np.random.default_rng(number).integers(0, 60, (48, 64, 3), dtype=np.uint8)
    for box, name in zip(boxes, names, strict=False):
        if isinstance(box, list) and np.isfinite(box).all():
            x1, y1, x2, y2 = (max(0, int(edge)) for edge in box)
            pixels[y1:y2, x1:x2] = COLOURS.get(name, (200, 200, 200))
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "images" / f"{number}.JPEG")
    write_label(folder, number, bboxes=boxes, labels=names, image_size=[64, 48], **keys)


def write_label(folder: Path, number: int, **content: Any) -> None:
    (folder / "labels" / f"{number}.yml").write_text(yaml.safe_dump(content))


def write_set(root: Path, training: int = 8, validation: int = 3) -> Path:
    """A sound set: a cat and a dog an image at random places; training image 1 is empty."""
    for split, first, count in (("training", 1, training), ("validation", 30001, validation)):
        for number in range(first, first + count):
            random = np.random.default_rng(number)
            x, y = random.integers(0, 20, 2).tolist()
            boxes = [[x, y, x + 22, y + 20], [x + 21, y + 2, x + 41.25, y + 26.5]]
            empty = number == 1
            write_example(root / split, number, [] if empty else boxes, [] if empty else ["cat", "dog"])
    return root


def archived(root: Path, to: Path) -> Archive:
    """The files below `root` as an archive that is read in place."""
    archive = pack(root, to / "set.sqsh")
    return Archive(archive, sha256(archive), to / "archive.npz")
