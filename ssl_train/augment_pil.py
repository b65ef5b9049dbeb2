"""A view by Pillow and torchvision, as MoCo v2 was published: the reference, and the slowest."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from ssl_train.augment import View

OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def apply(image: np.ndarray, view: View, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3) uint8."""
    picture = F.resized_crop(
        Image.fromarray(image), view.top, view.left, view.height, view.width, [side, side], F.InterpolationMode.BILINEAR
    )
    for operation in view.order:
        picture = OPERATIONS[operation](picture, view.factors[operation])
    if view.grayscale:
        picture = F.rgb_to_grayscale(picture, num_output_channels=3)
    if view.sigma:
        picture = picture.filter(ImageFilter.GaussianBlur(view.sigma))
    return np.array(F.hflip(picture) if view.flip else picture)
