"""How each kind of detector reads a labelled set, and what its outputs mean: the one place that asks for the kind.

Training, validation and evaluation take the `Reader` of a model and know nothing else about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import nn
from torch.utils.data import Dataset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detect_train import data, regions, squares
from detect_train.data import Example
from detect_train.heads import Detections
from detect_train.regions import Regions, Rules
from detect_train.squares import Size
from detect_train.targets import Batch, Images
from utils.labels import LabelIndex


class Given(NamedTuple):
    """The images of one forward pass, and what to know of those of them that are no filling."""

    images: Images
    ids: list[int]
    sizes: list[Size]


class Reader(Protocol):
    @property
    def watched(self) -> tuple[str, ...]:
        """The detector's submodules whose outputs, tensors however nested, have to be finite."""

    def examples(self, index: LabelIndex, *, flip: bool) -> Dataset[Example]: ...

    def collate(self, index: LabelIndex) -> Callable[[Sequence[Example]], Batch]:
        """What makes a training step's share of examples of `index`."""

    def gather(self, examples: Sequence[Example], batch_size: int) -> Given:
        """Up to `batch_size` examples as the detector wants them in eval mode."""

    def detections(self, outputs: Any, sizes: Sequence[Size]) -> Detections:
        """Each image's `boxes` in its own pixels, `scores` and `labels`, from what the detector returned."""


class WholeImages:
    """For torchvision's R-CNN detectors: images as they are, of any sizes; detections are what they return."""

    watched = ("rpn.head", "roi_heads.box_predictor")

    def examples(self, index: LabelIndex, *, flip: bool) -> Dataset[Example]:
        return data.DetectionImages(index, flip=flip)

    def collate(self, index: LabelIndex) -> Callable[[Sequence[Example]], Batch]:
        return data.collate

    def gather(self, examples: Sequence[Example], batch_size: int) -> Given:
        sizes = [(image.shape[1], image.shape[2]) for image, _ in examples]
        return Given([image for image, _ in examples], ids(examples), sizes)

    def detections(self, outputs: Any, sizes: Sequence[Size]) -> Detections:
        return list(outputs)


class InSquares(NamedTuple):
    """For a `regions.SquareDetector`, whose three attributes these are: one shape, whatever the images are."""

    side: int
    rules: Rules
    watched: tuple[str, ...]

    def examples(self, index: LabelIndex, *, flip: bool) -> Dataset[Example]:
        return squares.Squares(index, self.side, flip=flip)

    def collate(self, index: LabelIndex) -> Callable[[Sequence[Example]], Batch]:
        return partial(squares.collate, most=squares.most_boxes(index))

    def gather(self, examples: Sequence[Example], batch_size: int) -> Given:
        sizes = [target["size"] for _, target in examples]
        return Given(squares.stack(examples, batch_size), ids(examples), sizes)

    def detections(self, outputs: Regions, sizes: Sequence[Size]) -> Detections:
        return regions.detections(outputs, sizes, self.side, self.rules)


def of(model: nn.Module) -> Reader:
    """The reader for `model`, either torchvision's R-CNN or a `SquareDetector`."""
    if isinstance(model, GeneralizedRCNN):
        return WholeImages()
    square: Any = model
    return InSquares(square.side, square.rules, square.watched)


def ids(examples: Sequence[Example]) -> list[int]:
    return [int(target["image_id"]) for _, target in examples]
