"""The files of one split of the labelled set: found, read and checked, every problem in words."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils import images, typed_yaml
from utils.errors import InputError

YAML_SUFFIXES = (".yml", ".yaml")
ID = re.compile(r"[0-9]{1,15}")  # detections carry ids as float64
ROUNDING = 0.01  # px a box may leave its image: labels carry two decimals
SMALLEST = 0.005  # px: a thinner box is empty once it is resized in float32
HUGEST = 1e9  # px: beyond any image, and within what arithmetic here can do
LARGEST = 4 << 20  # bytes of a label file: tens of thousands of boxes
MOST = 50_000  # boxes of an image; aliases make more of them out of few bytes
LONGEST_NAME = 100  # characters of a class name
NO_FILE = "not a file, or a link to none"  # opening a FIFO would wait for ever

Scan = list[tuple[str, int, int]]  # file name, bytes, mtime in ns
Documents = Mapping[str, Any]  # label file name -> its content, or the InputError of reading it

_words = reprlib.Repr()
_words.maxlevel = 1  # nested aliases can stand for more than fits in memory
brief = _words.repr


class Example(NamedTuple):
    """A usable image with its usable boxes; labels from 1."""

    id: int
    file: str  # relative to the split's folder
    size: tuple[int, int]  # width, height
    boxes: list[list[float]]
    labels: list[int]


def scan(root: Path, split: str, folder: str, suffixes: tuple[str, ...]) -> Scan:
    """The files of one folder, sorted by name; hidden ones belong to other programs. Raises: InputError."""
    try:
        with os.scandir(root / split / folder) as entries:
            found = [
                (entry.name, status.st_size, status.st_mtime_ns)
                for entry in entries
                if entry.name.lower().endswith(suffixes) and not entry.name.startswith(".")
                for status in [_status(entry)]
            ]
    except OSError as error:
        reason = f"{root / split / folder}: {error.strerror}"
        raise InputError(f"{reason}; a split of the labelled set has the folders images and labels") from None
    return sorted(found)


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    """Of what a link leads to; of the link itself when it leads nowhere."""
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)


def read(root: Path, split: str, texts: Scan) -> dict[str, Any]:
    """The content of each label file, or the InputError of reading it."""
    result: dict[str, Any] = {}
    for name, size, _ in texts:
        path = root / split / "labels" / name
        try:
            if reason := _unreadable(path, size, root):
                raise InputError(f"{path}: {reason}")
            result[name] = typed_yaml.read(path)
        except InputError as error:
            result[name] = InputError(" ".join(str(error).split()).removeprefix(f"{root}/{split}/"))
    return result


def _unreadable(path: Path, size: int, root: Path) -> str | None:
    """Why a label file is not opened."""
    if not path.is_file():
        return NO_FILE
    # words of a label file stand in messages, so it must not be a way into somebody's other files
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        return f"a link to {os.readlink(path)!a}, outside the data"
    return f"{size} bytes; at most {LARGEST}" if size > LARGEST else None


def class_names(documents: Documents) -> tuple[str, ...]:
    """The class names that stand in label files, sorted."""
    rows = [document.get("labels") for document in documents.values() if isinstance(document, dict)]
    return tuple(sorted({name for row in rows if isinstance(row, list) for name in row if is_class_name(name)}))


def is_class_name(name: Any) -> bool:
    """Whether `name` can stand in a line of a report."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()


def check(
    root: Path, split: str, classes: Sequence[str], pictures: Scan, documents: Documents
) -> tuple[list[Example], list[str]]:
    """The usable examples by ascending id, and every problem with its file."""
    problems: list[str] = []
    by_id: dict[int, dict[str, list[str]]] = {}
    for file in [*(f"images/{name}" for name, _, _ in pictures), *(f"labels/{name}" for name in documents)]:
        if ID.fullmatch(Path(file).stem):
            pair = by_id.setdefault(int(Path(file).stem), {"images": [], "labels": []})
            pair[file.partition("/")[0]].append(file)
        else:
            shown = file if file.isprintable() else ascii(file)
            problems.append(f"{split}/{shown}: its name is not a number, and ids come from names")
    known = {name: number for number, name in enumerate(classes, start=1)}
    examples = []
    for number, pair in sorted(by_id.items()):
        example, found = _example(root / split, number, pair, documents, known)
        problems += [f"{split}/{problem}" for problem in found]
        examples += [example] if example else []
    return examples, problems


def _example(
    folder: Path, number: int, pair: Mapping[str, list[str]], documents: Documents, known: Mapping[str, int]
) -> tuple[Example | None, list[str]]:
    """The usable part of one id, whose files are `pair`, and its problems."""
    pictures, texts = pair["images"], pair["labels"]
    if len(pictures) > 1 or len(texts) > 1:
        return None, [f"{file}: several files have the id {number}" for file in max(pictures, texts, key=len)]
    problems = []
    size: tuple[int, int] | None = None
    if pictures:
        picture = folder / pictures[0]
        size, reason = images.check(picture) if picture.is_file() else (None, NO_FILE)
        problems += [f"{pictures[0]}: {reason}"] if reason else []
    else:
        problems.append(f"{texts[0]}: no image of this id")
    if not texts:
        return None, [*problems, f"{pictures[0]}: no label file of this id"]
    document = documents[Path(texts[0]).name]
    if isinstance(document, InputError):
        return None, [*problems, str(document)]
    if reason := _document_problem(document, size):
        return None, [*problems, f"{texts[0]}: {reason}"]
    boxes, labels = [], []
    for row, (box, name) in enumerate(zip(document["bboxes"], document["labels"], strict=True)):
        if reason := _box_problem(box, name, size, known):
            problems.append(f"{texts[0]}: box {row}: {reason}")
        else:
            boxes.append(box)
            labels.append(known[name])
    return Example(number, pictures[0], size, boxes, labels) if size else None, problems


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
