"""Boxes of many images at once, xyxy in pixels, in float32. The arithmetic is torchvision's, operation by operation.

No function here makes a tensor of Python numbers on the device: each would be a copy that the host waits for.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

Weights = tuple[float, float, float, float]  # of the offsets x, y, width, height
LARGEST_GROWTH = math.log(1000 / 16)  # of a side, in one step


def in_float32(layer: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """`layer`, whatever the rest is computed in: bf16 has three digits, a pixel in 300."""
    with torch.autocast(features.device.type, enabled=False):
        return cast(torch.Tensor, layer(features.float()))


def iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each of (..., G, 4) with each of (..., N, 4): (..., G, N); NaN for two empty ones."""
    a, b = (boxes.transpose(-1, -2).contiguous() for boxes in (first, second))  # rows of x1, y1, x2, y2
    a_x1, a_y1, a_x2, a_y2 = (side[..., :, None] for side in a.unbind(-2))
    b_x1, b_y1, b_x2, b_y2 = (side[..., None, :] for side in b.unbind(-2))
    shared = (torch.minimum(a_x2, b_x2) - torch.maximum(a_x1, b_x1)).clamp_(min=0)
    shared *= (torch.minimum(a_y2, b_y2) - torch.maximum(a_y1, b_y1)).clamp_(min=0)
    union = (a_x2 - a_x1) * (a_y2 - a_y1) + (b_x2 - b_x1) * (b_y2 - b_y1)
    return shared / union.sub_(shared)


def encode(reference: torch.Tensor, boxes: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The offsets (..., 4) that lead from `boxes` (..., 4) to `reference` (Ren et al., 2015, equation 2)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    to_x1, to_y1, to_x2, to_y2 = reference.unbind(-1)
    width, height, to_width, to_height = x2 - x1, y2 - y1, to_x2 - to_x1, to_y2 - to_y1
    dx = weights[0] * ((to_x1 + 0.5 * to_width) - (x1 + 0.5 * width)) / width
    dy = weights[1] * ((to_y1 + 0.5 * to_height) - (y1 + 0.5 * height)) / height
    dw = weights[2] * torch.log(to_width / width)
    dh = weights[3] * torch.log(to_height / height)
    return torch.stack([dx, dy, dw, dh], dim=-1)


def decode(offsets: torch.Tensor, boxes: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The boxes (..., 4) to which `offsets` (..., 4) lead from `boxes` (..., 4)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    dx, dy, dw, dh = (offset / weight for offset, weight in zip(offsets.unbind(-1), weights, strict=True))
    width, height = x2 - x1, y2 - y1
    x = dx * width + (x1 + 0.5 * width)
    y = dy * height + (y1 + 0.5 * height)
    half_width = 0.5 * (torch.exp(dw.clamp(max=LARGEST_GROWTH)) * width)
    half_height = 0.5 * (torch.exp(dh.clamp(max=LARGEST_GROWTH)) * height)
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def select(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` (B, M) of each image's `values` (B, N) or (B, N, K): (B, M) or (B, M, K)."""
    if values.ndim == 2:
        return values.gather(1, index)
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
