"""What a detector of fixed shapes computes on its device, and how the host makes detections of it.

Such a detector is a `SquareDetector`: any module with this `forward` in eval mode and these attributes is trained,
evaluated and reported like the others (`reading.py`). Where objects are, how many survive non-maximum suppression,
depends on the picture; so that is the host's part, and the device always computes K regions an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torchvision.ops import batched_nms

from detect_train.heads import Detections
from detect_train.squares import Size, fitted

SMALLEST = 0.01  # pixels of a side, as torchvision has it: what cutting to the picture leaves of a box beside it


class Regions(NamedTuple):
    """K candidates of each of B images, in any order."""

    boxes: torch.Tensor  # (B, K, 4) float32, xyxy pixels of the square; may reach out of the picture
    scores: torch.Tensor  # (B, K) float32 in [0, 1]; 0: none
    labels: torch.Tensor  # (B, K) int64 in 1..C


class Rules(NamedTuple):
    """Which regions are detections."""

    score_threshold: float  # they have more
    overlap: float  # IoU with a better one of their class: at most that
    most: int  # in an image, the best


class SquareDetector(Protocol):
    side: int  # of the squares it reads, pixels
    rules: Rules
    watched: tuple[str, ...]  # its submodules whose outputs, tensors however nested, have to be finite

    def __call__(self, images: torch.Tensor) -> Regions:
        """The regions of (B, 3, side, side) uint8 images, in eval mode."""


def detections(regions: Regions, sizes: Sequence[Size], side: int, rules: Rules) -> Detections:
    """Each picture's `boxes` (in its own pixels), `scores` and `labels`, from the best to the worst, on the host.

    Args:
        sizes: height and width of the pictures; images after the last of them are filling.
    """
    boxes, scores, labels = (part.cpu() for part in regions)
    return [_of_picture(boxes[i], scores[i], labels[i], size, side, rules) for i, size in enumerate(sizes)]


def _of_picture(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, size: Size, side: int, rules: Rules
) -> dict[str, torch.Tensor]:
    rows, columns = fitted(size, side)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([columns, rows] * 2))
    counts = (scores > rules.score_threshold) & ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(dim=1)
    boxes, scores, labels = boxes[counts], scores[counts], labels[counts]
    best = batched_nms(boxes, scores, labels, rules.overlap)[: rules.most]
    ratios = torch.tensor([size[1] / columns, size[0] / rows] * 2)
    return {"boxes": boxes[best] * ratios, "scores": scores[best], "labels": labels[best]}
