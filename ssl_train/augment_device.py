"""Views by batched tensor code on any device: every sample has its own numbers, and all have the same shape.

Nothing waits for the device, and no shape or index depends on the data, so that it can be compiled into a few kernels:
`torch.compile` on CUDA, plain on the CPU. float32 from crop to output, without the rounding between operations that
8 bits bring. Measured on: CPU.

Against Pillow's pipeline, in levels of 255: crop, brightness, contrast, saturation and grayscale differ by at most 1,
hue by 0.5 on average, 5 at the 99.9th percentile and 10 at most, blur by 0.5, 4 and 22, the last at edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch.nn import functional as F

from ssl_train.augment import CONTRAST, HUE, SATURATION, View, box_kernel
from utils.images import MEAN, STD

NOTHING = -1  # in the place of an operation
LUMA = (0.299, 0.587, 0.114)
CROP, OPERATIONS, FACTORS, GRAYSCALE, FLIP, KERNEL = 0, 4, 8, 12, 13, 14  # columns of `numbers`


def numbers(views: Sequence[View], sigma: float) -> torch.Tensor:
    """(n, KERNEL + reach + 1) float32: the views as a table; `sigma` is the greatest there can be.

    Crop; at each place of the jitter an operation, and its factor; grayscale; flip; half the blur's kernel.
    """
    reach = 3 * (len(box_kernel(sigma)) // 2)
    table = np.zeros((len(views), KERNEL + reach + 1), np.float32)
    table[:, KERNEL] = 1
    for row, view in zip(table, views, strict=True):
        row[CROP:OPERATIONS] = view[:4]
        padded = view.order + (NOTHING,) * (4 - len(view.order))
        row[OPERATIONS:FACTORS] = padded
        row[FACTORS:GRAYSCALE] = [view.factors[operation] if operation != NOTHING else 1 for operation in padded]
        row[GRAYSCALE], row[FLIP] = view.grayscale, view.flip
        if view.sigma:
            box = box_kernel(view.sigma)
            half = np.convolve(np.convolve(box, box), box)[3 * (len(box) // 2) :]
            row[KERNEL : KERNEL + len(half)] = half
    return torch.from_numpy(table)


def apply(images: torch.Tensor, numbers: torch.Tensor, side: int | None) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, S, S) float32, normalised, channels_last.

    `side` is S, and images are cropped; None: they are crops already.
    """
    with torch.autocast(images.device.type, enabled=False):  # bf16 would cost whole levels
        return _program(images.device.type)(images, numbers, side)


@cache
def _program(kind: str) -> Callable[[torch.Tensor, torch.Tensor, int | None], torch.Tensor]:
    return torch.compile(views, fullgraph=True, dynamic=False) if kind == "cuda" else views


def views(images: torch.Tensor, numbers: torch.Tensor, side: int | None) -> torch.Tensor:
    """`apply`, not compiled."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    if side is not None:
        pixels = _crop(pixels, numbers[:, CROP:OPERATIONS], side)
    columns = numbers[:, :, None, None, None].unbind(1)  # (n, 1, 1, 1) each
    for operation, factor in zip(columns[OPERATIONS:FACTORS], columns[FACTORS:GRAYSCALE], strict=True):
        pixels = _jitter(pixels, operation, factor)
    pixels = torch.where(columns[GRAYSCALE] > 0, _gray(pixels), pixels)
    pixels = _blur(pixels, numbers[:, KERNEL:])
    pixels = torch.where(columns[FLIP] > 0, pixels.flip(-1), pixels)
    planes = [(pixels[:, channel] - MEAN[channel]) / STD[channel] for channel in range(3)]
    return torch.stack(planes, dim=-1).permute(0, 3, 1, 2)


def _crop(pixels: torch.Tensor, boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Cut out (top, left, height, width) and resize: two products with matrices of bilinear weights."""
    top, left, height, width = boxes.unbind(1)
    across = _weights(left, width, pixels.shape[-1], side)
    down = _weights(top, height, pixels.shape[-2], side)
    return down[:, None] @ (pixels @ across.transpose(1, 2)[:, None])


def _weights(start: torch.Tensor, length: torch.Tensor, size: int, side: int) -> torch.Tensor:
    """(n, side, size): how much of each pixel is in each pixel of the view; Pillow's triangle, wider when shrinking."""
    scale = (length / side)[:, None, None]
    first, last = start[:, None, None], (start + length)[:, None, None]
    centre = first + (torch.arange(side, device=start.device)[:, None] + 0.5) * scale
    place = torch.arange(size, device=start.device) + 0.5
    weights = (1 - (place - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = torch.where((place > first) & (place < last), weights, 0)
    return weights / weights.sum(-1, keepdim=True)


def _gray(pixels: torch.Tensor) -> torch.Tensor:
    red, green, blue = pixels.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def _jitter(pixels: torch.Tensor, operation: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Each sample's own operation: a blend with black, with the mean gray or with its gray, or hues turned."""
    gray = _gray(pixels)
    mean = (gray.mean((-2, -1), keepdim=True) * 255 + 0.5).floor() / 255  # a whole level, as Pillow's
    other = torch.where(operation == CONTRAST, mean, torch.where(operation == SATURATION, gray, 0))
    blended = (other + factor * (pixels - other)).clamp(0, 1)
    changed = torch.where(operation == HUE, _turned(pixels, factor[:, 0]), blended)
    return torch.where(operation == NOTHING, pixels, changed)


def _turned(pixels: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Every hue turned, by way of HSV; value and chroma stay, hue counts sixths of a turn."""
    red, green, blue = pixels.unbind(1)
    value, least = pixels.amax(1), pixels.amin(1)
    chroma = value - least
    divisor = torch.where(chroma == 0, 1, chroma)
    from_blue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, from_blue) + 6 * turns
    channels = []
    for offset in (5, 3, 1):
        sixth = (offset + hue) % 6
        channels.append(value - chroma * torch.minimum(sixth, 4 - sixth).clamp(0, 1))
    return torch.stack(channels, dim=1)


def _blur(pixels: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """With each sample's own symmetric kernel, of which `half` (n, reach + 1) starts at the middle."""
    (n, _, height, width), reach = pixels.shape, half.shape[1] - 1
    kernels = torch.cat((half[:, 1:].flip(1), half), 1).repeat_interleave(3, 0)[:, None, None]  # (3n, 1, 1, width)
    padded = F.pad(pixels, [reach] * 4, mode="replicate").reshape(1, 3 * n, height + 2 * reach, width + 2 * reach)
    across = F.conv2d(padded, kernels, groups=3 * n)
    return F.conv2d(across, kernels.transpose(2, 3), groups=3 * n).reshape(pixels.shape)
