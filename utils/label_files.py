"""The files of one split of the labelled set: found and read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from reprlib import repr as brief
from typing import Any

import numpy as np

from utils import images, typed_yaml
from utils.errors import InputError
from utils.tree import Folder, Tree

YAML_SUFFIXES = (".yml", ".yaml")
LARGEST = 4 << 20  # bytes of a label file: tens of thousands of boxes
AT_ONCE = 128  # files that are asked for together: a batch of images takes 20 MB
LONGEST_NAME = 100  # characters of a class name


class Split:
    """The files of one split, looked for when they are first asked for: that goes through all names of the tree.

    Args:
        beside: the splits read with it: they lie in one place.
    """

    def __init__(self, tree: Tree, name: str, beside: Iterable[str]) -> None:
        self.tree, self.name, self.beside = tree, name, tuple(beside)

    @cached_property
    def place(self) -> str:
        """What the names of the files of all splits begin with."""
        found = any(len(self.tree.find(name)) for name in self.beside)
        return "" if found or not len(self.tree.find("labeled")) else "labeled/"

    @property
    def root(self) -> str:
        """The folder of all splits, for messages."""
        return f"{self.tree}/{self.place}".rstrip("/")

    def __str__(self) -> str:
        return f"{self.root}/{self.name}"

    @cached_property
    def pictures(self) -> np.ndarray:
        """Numbers of its images. Raises: InputError if there is none."""
        return self._files("images", images.SUFFIXES)

    @cached_property
    def texts(self) -> np.ndarray:
        """Numbers of its label files. Raises: InputError if there is none."""
        return self._files("labels", YAML_SUFFIXES)

    def _files(self, kind: str, suffixes: tuple[str, ...]) -> np.ndarray:
        found = self.tree.find(f"{self.place}{self.name}/{kind}", suffixes, deep=False)
        if not len(found):
            reason = f"{self}/{kind}: no {kind} ({', '.join(suffixes)})"
            raise InputError(f"{reason}; a split of the labelled set has the folders images and labels")
        return found

    @property
    def is_training(self) -> bool:
        return self.name == "training"

    @cached_property
    def training(self) -> Split:
        """The training split, whose labels name the classes of all."""
        return Split(self.tree, "training", self.beside)

    @cached_property
    def classes_file(self) -> np.ndarray:
        """The number of `classes.txt` beside the splits, if there is one."""
        found = self.tree.find(self.place.rstrip("/"), ("classes.txt",), deep=False)
        return np.array([number for number in found.tolist() if self.short(number) == "classes.txt"], np.int64)

    def short(self, number: int) -> str:
        """A file's name below `root`, as it stands in problems."""
        return self.tree.name(number)[len(self.place) :]


def read(split: Split) -> dict[int, Any]:
    """The content of each label file by its number, or the InputError of reading it, with its short name."""
    result: dict[int, Any] = {}
    for number in ahead(split.tree, split.texts.tolist()):
        try:
            if reason := _unreadable(split.tree, number):
                raise InputError(f"{split.short(number)}: {reason}")
            result[number] = typed_yaml.parse_lists(split.tree.read(number), split.short(number))
        except InputError as error:
            result[number] = InputError(shortened(error, split, number))
    return result


def ahead(tree: Tree, numbers: Sequence[int]) -> Iterator[int]:
    """The numbers, of files that are read one after another: some of them are asked for at once."""
    for place, number in enumerate(numbers):
        if place % AT_ONCE == 0:
            tree.ahead(numbers[place : place + AT_ONCE])
        yield number


def shortened(error: InputError, split: Split, number: int) -> str:
    """The error of a file, on one line that begins with its short name."""
    text = str(error).replace(split.tree.shown(number), split.short(number), 1)
    return " ".join(text.split())


def _unreadable(tree: Tree, number: int) -> str | None:
    """Why a label file is not opened."""
    size, _ = tree.stamp(number)
    if size > LARGEST:
        return f"{size} bytes; at most {LARGEST}"
    # words of a label file stand in messages, so it must not be a way into somebody's other files
    if isinstance(tree, Folder) and (target := tree.leads_out(number)):
        return f"a link to {target!a}, outside the data"
    return None


def class_names(split: Split, documents: Mapping[int, Any]) -> tuple[str, ...]:
    """The classes where none are given: those of `classes.txt`, else the sorted names in the training labels.

    Args:
        documents: of this split.

    Raises: InputError for a bad `classes.txt`.
    """
    for number in split.classes_file.tolist():
        return parse_classes(split.tree.read(number), split.tree.shown(number))
    training = documents if split.is_training else read(split.training)
    rows = [document.get("labels") for document in training.values() if isinstance(document, dict)]
    return tuple(sorted({name for row in rows if isinstance(row, list) for name in row if is_class_name(name)}))


def parse_classes(content: bytes, name: str) -> tuple[str, ...]:
    """The class names in a text, one a line; `name` says in errors where it came from. Raises: InputError."""
    try:
        names = tuple(line.strip() for line in content.decode().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"classes {name}: {error}") from None
    if not names or len(set(names)) != len(names):
        raise InputError(f"classes {name}: expected one distinct name a line, got {len(names)} names")
    for word in names:
        if not is_class_name(word):
            raise InputError(f"classes {name}: {brief(word)}: at most {LONGEST_NAME} printable characters")
    return names


def is_class_name(name: Any) -> bool:
    """Whether `name` can stand in a line of a report."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()
