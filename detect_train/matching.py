"""Which boxes stand for which objects, and the random sample of them that a loss sees, for a whole batch at once.

The rules are torchvision's `Matcher` and `BalancedPositiveNegativeSampler`. Theirs look for what they chose, image by
image, and each look stalls a GPU; here shapes are the same whatever is chosen, and masks say what counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from detect_train.geometry import iou
from detect_train.targets import Targets

LIMIT = 1 << 26  # pairs of a box and an object that are compared at once: 256 MiB for each number about a pair


class Match(NamedTuple):
    """Of each box: its object, if it has one."""

    nearest: torch.Tensor  # (B, N) int64: the row of the object that it overlaps most
    kind: torch.Tensor  # (B, N) int8: 1 it stands for that object, 0 for the background, -1 for neither


class Sample(NamedTuple):
    """M places for each image's sample, objects first; not all are taken."""

    rows: torch.Tensor  # (B, M) int64: of boxes; none is in two places that are taken
    positive: torch.Tensor  # (B, M) bool: taken, by a box that stands for an object
    taken: torch.Tensor  # (B, M) bool


def match(targets: Targets, boxes: torch.Tensor, *, low: float, high: float, at_least_one: bool) -> Match:
    """Give each box the object it overlaps most, if that is enough.

    Args:
        boxes: (B, N, 4), or (1, N, 4) for the same in every image.
        low, high: IoU below which a box is background and from which on it stands for the object.
        at_least_one: a box that overlaps some object as much as no other box does stands for the object that it
            overlaps most, however little that is.
    """
    images, objects = targets.labels.shape
    step = max(1, LIMIT // (objects * boxes.shape[1]))
    parts = []
    for first in range(0, images, step):
        some = slice(first, first + step)
        overlap = iou(targets.boxes[some], boxes if len(boxes) == 1 else boxes[some])
        parts.append(_match(overlap, targets.present()[some, :, None], low, high, at_least_one))
    return parts[0] if len(parts) == 1 else Match(*map(torch.cat, zip(*parts, strict=True)))


def _match(overlap: torch.Tensor, present: torch.Tensor, low: float, high: float, at_least_one: bool) -> Match:
    """The matches of (B, G, N) overlaps, of which those with objects that are not `present` (B, G, 1) do not count."""
    overlap.masked_fill_(~present, -1)
    best, index = overlap.max(dim=1)
    kind = (best >= high).to(torch.int8) - ((best >= low) & (best < high)).to(torch.int8)
    if at_least_one:
        unsurpassed = (overlap == overlap.amax(dim=2, keepdim=True)) & present
        kind.masked_fill_(unsurpassed.any(dim=1), 1)
    return Match(index, kind)


def sample(kind: torch.Tensor, size: int, fraction: float) -> Sample:
    """Draw `size` boxes an image, at most `fraction` of them objects, uniformly and without replacement.

    Fewer when there are fewer: background fills up the sample, objects do not. Each box draws a number in [0, 1) and
    the largest are taken, which is a random permutation cut off (float64: ties are as good as impossible).

    Args:
        kind: (B, N), above 0 for objects, 0 for background, below 0 for what is not to be drawn.
    """
    keys = torch.rand(kind.shape, dtype=torch.float64, device=kind.device)
    objects = torch.where(kind > 0, keys, -1).topk(min(int(size * fraction), kind.shape[1]))
    others = torch.where(kind == 0, keys, -1).topk(min(size, kind.shape[1]))
    positive = objects.values >= 0
    rank = torch.arange(others.values.shape[1], device=kind.device)
    negative = (others.values >= 0) & (rank < size - positive.sum(dim=1, keepdim=True))
    return Sample(
        torch.cat([objects.indices, others.indices], dim=1),
        torch.cat([positive, torch.zeros_like(negative)], dim=1),
        torch.cat([positive, negative], dim=1),
    )
