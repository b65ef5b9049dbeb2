"""Unlabelled images, two random views of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from torchvision import transforms

from utils import images
from utils.errors import InputError

View = Callable[[Image.Image], torch.Tensor]


class UnlabeledImages(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Every PNG and JPEG below `root`, sorted by path, as (query view, key view), two calls of `view`.

    Raises: InputError when there is none; what `images.load` raises for an image that cannot be decoded.
    """

    def __init__(self, root: Path, view: View) -> None:
        self.files, self.view = images.find(root), view
        if not self.files:
            raise InputError(f"{root}: no PNG or JPEG image in it or below; check data.unlabeled")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = images.load(self.files[index])
        return self.view(image), self.view(image)


class Blur:
    """Gaussian blur with a random sigma of `least` to `greatest` pixels: Pillow's, as published."""

    def __init__(self, least: float, greatest: float) -> None:
        self.least, self.greatest = least, greatest

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.least, self.greatest)))


def random_view(
    *,
    image_size: int,
    crop_scale: tuple[float, ...],
    jitter: tuple[float, ...],
    jitter_p: float,
    grayscale_p: float,
    blur_p: float,
    blur_sigma: tuple[float, ...],
) -> View:
    """MoCo v2's augmentation (arXiv:2003.04297): RGB image -> (3, image_size, image_size), normalised."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=crop_scale),
            transforms.RandomApply([transforms.ColorJitter(*jitter)], p=jitter_p),
            transforms.RandomGrayscale(p=grayscale_p),
            transforms.RandomApply([Blur(*blur_sigma)], p=blur_p),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(images.MEAN, images.STD),
        ]
    )
