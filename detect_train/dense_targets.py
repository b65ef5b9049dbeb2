"""Which places of a feature pyramid stand for which object (FCOS: Tian et al., 2019, arXiv:1904.01355, section 3).

Everything here is arithmetic on arrays of fixed shapes: nothing is looked for, so nothing depends on what is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from detect_train.targets import Targets

RADIUS = 1.5  # strides from the middle of an object, within which places stand for it
MOST = 1e30  # pixels, and square pixels; not infinity, which XLA makes the greatest float of, and that is below it


class Places(NamedTuple):
    """The N points of a square that predict, level after level, in each row after row."""

    points: torch.Tensor  # (N, 2) float32: x, y in pixels
    strides: torch.Tensor  # (N,) float32: pixels between neighbours
    ranges: torch.Tensor  # (N, 2) float32: the longest of the four distances to a box, from and to


class Goals(NamedTuple):
    """What each place should say."""

    labels: torch.Tensor  # (B, N) int64: of its object, 0 for background
    distances: torch.Tensor  # (B, N, 4) float32: to the left, top, right, bottom side in pixels; 1 for background
    centerness: torch.Tensor  # (B, N) float32: 1 in the middle of the object, 0 at its sides


def places(grids: Sequence[int], strides: Sequence[int], sizes: Sequence[int]) -> Places:
    """Of square levels with `grids` rows and columns.

    Args:
        sizes: a level is for longest distances up to twice its own, from twice that of the level before it; the last
            is for all above. The paper's 64, 128, 256 and 512 are twice the sides of the usual anchors.
    """
    bounds = [0.0, *(2.0 * size for size in sizes[:-1]), MOST]
    points, own_strides, ranges = [], [], []
    for level, (grid, stride) in enumerate(zip(grids, strides, strict=True)):
        along = torch.arange(grid, dtype=torch.float32) * stride + stride // 2
        y, x = torch.meshgrid(along, along, indexing="ij")
        points.append(torch.stack([x, y], dim=-1).view(-1, 2))
        own_strides.append(torch.full((grid * grid,), float(stride)))
        ranges.append(torch.tensor(bounds[level : level + 2]).expand(grid * grid, 2))
    return Places(torch.cat(points), torch.cat(own_strides), torch.cat(ranges))


def assign(targets: Targets, places: Places) -> Goals:
    """Give each place the smallest of the objects that it may stand for.

    It stands for an object when it lies in the box, at most `RADIUS` strides from its middle along each axis, and the
    longest of its distances to the sides is in its level's range.
    """
    x, y = places.points[:, None].unbind(-1)  # (N, 1) each, against (B, 1, G) of the objects
    x1, y1, x2, y2 = targets.boxes[:, None].unbind(-1)
    distances = torch.stack([x - x1, y - y1, x2 - x, y2 - y], dim=-1)  # (B, N, G, 4)
    reach = RADIUS * places.strides[:, None]
    central = ((x - (x1 + x2) / 2).abs() < reach) & ((y - (y1 + y2) / 2).abs() < reach)
    longest = distances.amax(dim=-1)
    fits = (longest >= places.ranges[:, :1]) & (longest <= places.ranges[:, 1:])
    may = (distances.amin(dim=-1) > 0) & central & fits & targets.present()[:, None]
    area, choice = torch.where(may, (x2 - x1) * (y2 - y1), MOST).min(dim=-1)  # (B, N)
    positive = area < MOST
    own = distances.gather(2, choice[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    own = torch.where(positive[..., None], own, 1.0)
    labels = targets.labels.gather(1, choice) * positive
    return Goals(labels, own, centerness(own))


def centerness(distances: torch.Tensor) -> torch.Tensor:
    """Equation 3 of the paper, of (..., 4) distances above 0."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return torch.sqrt(across * down)
