"""Images with their boxes, as torchvision's detectors take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from detect_train.targets import Batch, pad
from utils import images
from utils.labels import LabelIndex

Target = dict[str, Any]
Example = tuple[torch.Tensor, Target]


class DetectionImages(Dataset[Example]):
    """Example i of a label index: (image (3, H, W) uint8, target).

    The target has `boxes` (k, 4) float32 xyxy pixels, `labels` (k,) int64 in 1..C and `image_id`.

    Args:
        flip: mirror every second image with its boxes, drawn from torch's generator.
    """

    def __init__(self, index: LabelIndex, *, flip: bool) -> None:
        self.index, self.flip = index, flip

    def __len__(self) -> int:
        return len(self.index)

    def ahead(self, indices: Sequence[int]) -> None:
        """See `Tree.ahead`."""
        self.index.ahead(indices)

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        self.ahead(indices)
        return [self[i] for i in indices]

    def __getitem__(self, i: int) -> Example:
        picture = np.array(images.decode(self.index.read(i), self.index.shown(i)))
        image = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
        boxes, labels = self.index.target(i)
        target = {
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.from_numpy(labels),
            "image_id": int(self.index.ids[i]),
        }
        return mirror(image, target) if self.flip and torch.rand(()) < 0.5 else (image, target)


def mirror(image: torch.Tensor, target: Target) -> Example:
    """The image and its boxes with left and right exchanged."""
    x1, y1, x2, y2 = target["boxes"].unbind(dim=1)
    width = image.shape[2]
    return image.flip(2), {**target, "boxes": torch.stack([width - x2, y1, width - x1, y2], dim=1)}


def collate(examples: Sequence[Example]) -> Batch:
    """A training step's share: one tensor of the images if they are of one size, and their padded targets."""
    images = [image for image, _ in examples]
    alike = len({image.shape for image in images}) == 1
    return Batch(torch.stack(images) if alike else images, pad([target for _, target in examples]))
