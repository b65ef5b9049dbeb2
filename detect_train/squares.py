"""Pictures in squares of one size, for detectors whose shapes never change: what is compiled once serves every batch.

The picture stands in the upper left corner, scaled until its longer side fits; beside or below it is the mean colour,
which normalisation turns into zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import nn

from detect_train.data import DetectionImages, Example
from detect_train.targets import Batch, pad
from utils.images import MEAN, STD
from utils.labels import LabelIndex

Size = tuple[int, int]  # height, width
FILL = torch.tensor([round(255 * level) for level in MEAN], dtype=torch.uint8)[:, None, None]

cv2.setNumThreads(0)  # other loader processes have the other cores


class Normalise(nn.Module):
    """uint8 images (B, 3, H, W) as float32 with the statistics that pretraining had."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.std


class Squares(DetectionImages):
    """Example i of a label index: (image (3, side, side) uint8, target).

    The target has `boxes` (k, 4) float32 xyxy pixels of the square, `labels` (k,) int64 in 1..C, `image_id`, and
    `size`: height and width of the picture itself.

    Args:
        flip: mirror every second picture with its boxes, drawn from torch's generator.
    """

    def __init__(self, index: LabelIndex, side: int, *, flip: bool) -> None:
        super().__init__(index, flip=flip)
        self.side = side

    def __getitem__(self, i: int) -> Example:
        picture, target = super().__getitem__(i)
        size = (picture.shape[1], picture.shape[2])
        rows, columns = fitted(size, self.side)
        square = FILL.repeat(1, self.side, self.side)
        square[:, :rows, :columns] = resized(picture, (rows, columns))
        ratios = torch.tensor([columns / size[1], rows / size[0]] * 2)
        return square, {**target, "boxes": target["boxes"] * ratios, "size": size}


def fitted(size: Size, side: int) -> Size:
    """Height and width in the square of a picture of `size`."""
    rows, columns = (max(1, round(length * side / max(size))) for length in size)
    return rows, columns


def resized(picture: torch.Tensor, size: Size) -> torch.Tensor:
    """(3, H, W) uint8 -> (3, *size) uint8: averaged over areas where it shrinks, interpolated where it grows."""
    how = cv2.INTER_AREA if max(size) < max(picture.shape[1:]) else cv2.INTER_LINEAR
    pixels = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
    return torch.from_numpy(cv2.resize(pixels, size[::-1], interpolation=how)).permute(2, 0, 1)


def most_boxes(index: LabelIndex) -> int:
    """The boxes of the image that has most: to how many rows all are padded."""
    return int(np.diff(index.offsets).max())


def collate(examples: Sequence[Example], most: int) -> Batch:
    """A training step's share: images (B, 3, side, side), and targets of `most` rows whatever is in them."""
    return Batch(torch.stack([image for image, _ in examples]), pad([target for _, target in examples], most))


def stack(examples: Sequence[Example], batch_size: int) -> torch.Tensor:
    """Images (batch_size, 3, side, side) to detect in; the first fills up the places of a last batch's that lack."""
    squares = [image for image, _ in examples]
    return torch.stack(squares + squares[:1] * (batch_size - len(squares)))
