"""The images and labels of one split compared with each other, every problem in words."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from utils import images
from utils.errors import InputError
from utils.label_files import LONGEST_NAME, Split, is_class_name, shortened

ID = re.compile(r"(?:images|labels)/([0-9]{1,15})\.[a-zA-Z]+")  # detections carry ids as float64
ROUNDING = 0.01  # px a box may leave its image: labels carry two decimals
SMALLEST = 0.005  # px: a thinner box is empty once it is resized in float32
HUGEST = 1e9  # px: beyond any image, and within what arithmetic here can do
MOST = 50_000  # boxes of an image; aliases make more of them out of few bytes

_words = reprlib.Repr()
_words.maxlevel = 1  # nested aliases can stand for more than fits in memory
brief = _words.repr


class Example(NamedTuple):
    """A usable image with its usable boxes; labels from 1."""

    id: int
    number: int  # of the image in the tree
    size: tuple[int, int]  # width, height
    boxes: list[list[float]]
    labels: list[int]


def check(split: Split, classes: Sequence[str], documents: Mapping[int, Any]) -> tuple[list[Example], list[str]]:
    """The usable examples by ascending id, and every problem with its file."""
    problems: list[str] = []
    by_id: dict[int, tuple[list[int], list[int]]] = {}
    start = len(split.place) + len(split.name) + 1
    for number in [*split.pictures.tolist(), *documents]:
        file = split.tree.name(number)[start:]
        if match := ID.fullmatch(file):
            pair = by_id.setdefault(int(match[1]), ([], []))
            pair[file.startswith("labels/")].append(number)
        else:
            shown = file if file.isprintable() else ascii(file)
            problems.append(f"{split.name}/{shown}: its name is not a number, and ids come from names")
    known = {name: number for number, name in enumerate(classes, start=1)}
    examples = []
    for identifier, (pictures, texts) in sorted(by_id.items()):
        example, found = _example(split, identifier, pictures, texts, documents, known)
        problems += found
        examples += [example] if example else []
    return examples, problems


def _example(
    split: Split,
    identifier: int,
    pictures: list[int],
    texts: list[int],
    documents: Mapping[int, Any],
    known: Mapping[str, int],
) -> tuple[Example | None, list[str]]:
    """The usable part of one id, whose files are `pictures` and `texts`, and its problems."""
    if len(pictures) > 1 or len(texts) > 1:
        several = max(pictures, texts, key=len)
        return None, [f"{split.short(number)}: several files have the id {identifier}" for number in several]
    problems = []
    size: tuple[int, int] | None = None
    if pictures:
        size, reason = _check_image(split, pictures[0])
        problems += [reason] if reason else []
    else:
        problems.append(f"{split.short(texts[0])}: no image of this id")
    if not texts:
        return None, [*problems, f"{split.short(pictures[0])}: no label file of this id"]
    text, document = split.short(texts[0]), documents[texts[0]]
    if isinstance(document, InputError):
        return None, [*problems, str(document)]
    if reason := _document_problem(document, size):
        return None, [*problems, f"{text}: {reason}"]
    boxes, labels = [], []
    for row, (box, name) in enumerate(zip(document["bboxes"], document["labels"], strict=True)):
        if reason := _box_problem(box, name, size, known):
            problems.append(f"{text}: box {row}: {reason}")
        else:
            boxes.append(box)
            labels.append(known[name])
    return Example(identifier, pictures[0], size, boxes, labels) if size else None, problems


def _check_image(split: Split, number: int) -> tuple[tuple[int, int] | None, str | None]:
    """The (width, height) of a usable image, or what is wrong with it."""
    try:
        size, reason = images.check(split.tree.read(number), split.short(number))
        return size, reason and f"{split.short(number)}: {reason}"
    except InputError as error:
        return None, shortened(error, split, number)


def _document_problem(document: Any, size: tuple[int, int] | None) -> str | None:
    """Why a label file as a whole is unusable; `size` is its image's, if that is known."""
    if not isinstance(document, dict):
        return f"expected keys and values, got {brief(document)}"
    for key in ("bboxes", "labels"):
        if not isinstance(document.get(key), list):
            got = f"got {brief(document[key])}" if key in document else "there is none"
            return f"{key}: expected a list, {got}"
    if len(document["bboxes"]) > MOST:
        return f"{len(document['bboxes'])} bboxes; at most {MOST}"
    if len(document["bboxes"]) != len(document["labels"]):
        return f"{len(document['bboxes'])} bboxes but {len(document['labels'])} labels"
    if size and document.get("image_size", list(size)) != list(size):
        return f"image_size is {brief(document['image_size'])}, but the image has {list(size)}"
    return None


def _box_problem(box: Any, name: Any, size: tuple[int, int] | None, known: Mapping[str, int]) -> str | None:
    """Why one box is unusable."""
    if not (isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)):
        return f"expected 4 numbers, got {brief(box)}"
    if not all(abs(value) < HUGEST for value in box):
        return f"{brief(box)} is not finite"
    if box[2] - box[0] < SMALLEST or box[3] - box[1] < SMALLEST:
        return f"{box} is empty or inverted; expected [xmin, ymin, xmax, ymax]"
    width, height = size or (math.inf, math.inf)
    if min(box) < -ROUNDING or box[2] > width + ROUNDING or box[3] > height + ROUNDING:
        return f"{box} is outside the image of {width}x{height}"
    if not isinstance(name, str) or name not in known:
        rule = f"; a name has 1 to {LONGEST_NAME} printable characters"
        return f"unknown class {brief(name)}{rule if isinstance(name, str) and not is_class_name(name) else ''}"
    return None
