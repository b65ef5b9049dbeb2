"""MoCo v2's augmentation (arXiv:2003.04297) as numbers: what is done to an image to make one view of it.

It is facebookresearch/moco's pipeline of torchvision's transforms: RandomResizedCrop, ColorJitter with a probability,
RandomGrayscale, Pillow's GaussianBlur with a probability, RandomHorizontalFlip. The random numbers are drawn here and
nowhere else; augment_opencv, augment_device and augment_pil apply them.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import NamedTuple

import numpy as np

RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
TRIES = 10  # crops that do not fit are drawn anew, and then the centre is taken
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the operations of the colour jitter
ORDERS = tuple(permutations(range(4)))
_LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))


class View(NamedTuple):
    """One view of an image: crop, then colour operations in `order`, grayscale, blur, flip."""

    top: int  # the crop, in pixels
    left: int
    height: int
    width: int
    factors: tuple[float, float, float, float]  # brightness, contrast, saturation: 1 changes nothing; hue: 0, in turns
    order: tuple[int, ...]  # which operations of the jitter, first to last; empty: none
    grayscale: bool
    sigma: float  # of the blur, pixels of the view; 0: none
    flip: bool


class Streams:
    """Independent random numbers for each (seed, epoch, image, which of its views), in any order, on any process.

    Philox (Salmon et al., SC 2011) is a function of a key and a counter: there is no state to keep or to advance.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        self._philox = np.random.Philox(key=np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64))
        self._state, self._generator = self._philox.state, np.random.Generator(self._philox)

    def at(self, index: int, which: int) -> np.random.Generator:
        """The generator at the start of one stream, valid until the next call."""
        self._state["state"]["counter"][:] = (0, index, which, 0)
        self._philox.state = self._state
        return self._generator


def draw(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    crop_scale: tuple[float, ...],
    jitter: tuple[float, ...],
    jitter_p: float,
    grayscale_p: float,
    blur_p: float,
    blur_sigma: tuple[float, ...],
) -> View:
    """The numbers of one view of a `width` x `height` image, distributed as torchvision's are.

    Operations of the jitter with strength 0 are left out, as torchvision does. One call takes 51 numbers from `rng`
    whatever comes out.
    """
    u = rng.random(4 * TRIES + 11).tolist()  # one call: each costs as much as the rest of this function
    jittered, gray, blurred, flipped, order, sigma, *strengths = u[4 * TRIES :]
    least = [1 - jitter[BRIGHTNESS], 1 - jitter[CONTRAST], 1 - jitter[SATURATION], -jitter[HUE]]
    brightness, contrast, saturation, hue = (
        start + 2 * strength * drawn for start, strength, drawn in zip(least, jitter, strengths, strict=False)
    )
    done = ORDERS[int(24 * order)] if jittered < jitter_p else ()
    return View(
        *_crop(u, width, height, crop_scale),
        factors=(brightness, contrast, saturation, hue),
        order=tuple(operation for operation in done if jitter[operation] > 0),
        grayscale=gray < grayscale_p,
        sigma=blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * sigma if blurred < blur_p else 0.0,
        flip=flipped < 0.5,
    )


def _crop(u: list[float], width: int, height: int, scale: tuple[float, ...]) -> tuple[int, int, int, int]:
    """RandomResizedCrop's top, left, height, width, from four numbers of `u` a try."""
    for start in range(0, 4 * TRIES, 4):
        share, turn, down, right = u[start : start + 4]
        area = width * height * (scale[0] + (scale[1] - scale[0]) * share)
        ratio = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * turn)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int((height - h + 1) * down), int((width - w + 1) * right), h, w
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(w / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(h * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def box_kernel(sigma: float) -> np.ndarray:
    """The box with fractional ends of which Pillow applies three, each way, for a Gaussian of `sigma` pixels.

    (2 r + 3,) float32, sum 1. Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", SSVM 2011.
    """
    variance = sigma * sigma / 3
    radius = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance) / (6 * (variance - (radius + 1) ** 2))
    kernel = np.ones(2 * radius + 3, np.float32)
    kernel[0] = kernel[-1] = end
    return kernel / (2 * radius + 1 + 2 * end)
