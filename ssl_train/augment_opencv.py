"""A view by OpenCV, in 8 bits throughout: what loader processes do.

Against Pillow's pipeline, in levels of 255: crop, brightness, contrast, saturation and grayscale differ by at most 1,
hue by 0.5 on average, 8 at the 99.9th percentile and 13 at most, blur by 0.5, 3 and 4.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from ssl_train.augment import BRIGHTNESS, CONTRAST, SATURATION, View, box_kernel

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2, Pillow's and OpenCV's
# OpenCV rounds where Pillow cuts off. What comes nearest: transform computes with few digits.
CUT, CUT_TRANSFORM = -0.499, -0.4

cv2.setNumThreads(0)  # other loader processes have the other cores


def apply(image: np.ndarray, view: View, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3) uint8."""
    pixels = crop(image, view, side)
    for operation in view.order:
        factor = view.factors[operation]
        if operation == BRIGHTNESS:
            pixels = cv2.addWeighted(pixels, factor, pixels, 0, CUT)
        elif operation == CONTRAST:
            mean = int(LUMA @ cv2.mean(pixels)[:3] + 0.5)
            pixels = cv2.addWeighted(pixels, factor, pixels, 0, mean * (1 - factor) + CUT)
        elif operation == SATURATION:
            mixed = np.full((3, 4), CUT_TRANSFORM, np.float32)
            mixed[:, :3] = (1 - factor) * LUMA + factor * np.eye(3)
            pixels = cv2.transform(pixels, mixed)
        else:
            pixels = _turned(pixels, factor)
    if view.grayscale:
        pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if view.sigma:
        kernel = box_kernel(view.sigma)
        for _ in range(3):
            pixels = cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return cv2.flip(pixels, 1) if view.flip else pixels


def crop(image: np.ndarray, view: View, side: int) -> np.ndarray:
    """The view's crop alone, (side, side, 3) uint8, bilinear and antialiased as Pillow's."""
    pixels = image[view.top : view.top + view.height, view.left : view.left + view.width]
    if max(view.height, view.width) <= side:
        return cv2.resize(pixels, (side, side), interpolation=cv2.INTER_LINEAR)
    # OpenCV does not antialias, or with another filter. torch's is Pillow's, at a third of the time.
    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    small = F.interpolate(planes, (side, side), mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0).numpy()


def _turned(pixels: np.ndarray, turns: float) -> np.ndarray:
    """Every hue turned."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(3 * pixels.shape[1], np.uint8)
    row[::3] = int(turns * 255) % 256
    hsv.reshape(len(hsv), -1)[:] += row  # wraps around, as hue does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
