"""Regions of images as crops of one size, by two matrix products: shapes are fixed, and every device has those.

Each axis is resized by a triangle as wide as two output pixels, or two input pixels if these are larger, so that
shrinking does not alias: what `F.interpolate(mode="bilinear", antialias=True)` does to a whole image.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def crop(images: torch.Tensor, boxes: torch.Tensor, side: int) -> torch.Tensor:
    """The regions `boxes` (B, K, 4) xyxy pixels of float `images` (B, C, H, W) as (B * K, C, side, side).

    Beyond its border an image goes on with the pixels there.
    """
    (batch, channels, height, width), count = images.shape, boxes.shape[1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    rows = weights(y1, y2, side, height)  # (B, K, side, H)
    columns = weights(x1, x2, side, width)  # (B, K, side, W)
    lines = rows.flatten(1, 2) @ images.transpose(1, 2).flatten(2)  # (B, K * side, C * W)
    lines = lines.reshape(batch * count, side * channels, width)
    crops = lines @ columns.flatten(0, 1).transpose(1, 2)  # (B * K, side * C, side)
    return crops.view(batch * count, side, channels, side).transpose(1, 2)


def weights(start: torch.Tensor, end: torch.Tensor, size: int, pixels: int) -> torch.Tensor:
    """(..., size, pixels): how much each pixel of an axis counts in each of `size` samples from `start` to `end`."""
    step = ((end - start) / size)[..., None]
    samples = torch.arange(size, device=start.device) + 0.5
    at = (start[..., None] + step * samples).clamp(0.5, pixels - 0.5)
    middles = torch.arange(pixels, device=start.device) + 0.5
    near = (1 - (middles - at[..., None]).abs() / step[..., None].clamp(min=1)).clamp(min=0)
    return near / near.sum(dim=-1, keepdim=True)


def enlarge(boxes: torch.Tensor, factor: float) -> torch.Tensor:
    """Boxes (..., 4) of `factor` times the width and height around the same centres."""
    low, high = boxes.split(2, dim=-1)
    middle, half = (low + high) / 2, (high - low) / 2 * factor
    return torch.cat([middle - half, middle + half], dim=-1)
