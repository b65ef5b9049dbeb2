"""Images and boxes as the detector works on them: normalised, resized and padded, on the device, as one batch."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detect_train.targets import Images, Targets
from utils.images import MEAN, STD

DIVISIBLE = 32  # by which both sides of the padded batch are: the stride of the coarsest level of the backbone


class Transform(GeneralizedRCNNTransform):
    """torchvision's, for uint8 images too (a quarter of the bytes between loader and device) and padded targets.

    Sizes and scales are the host's; it reads none back. Images of one size are one batch from the first operation on.
    """

    def __init__(self, min_size: tuple[int, ...], max_size: int) -> None:
        super().__init__(min_size, max_size, list(MEAN), list(STD), size_divisible=DIVISIBLE)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Images, targets: Targets | None = None) -> tuple[ImageList, Targets | None]:
        """The padded batch, float32, with the sizes in it, and the targets in its pixels."""
        given = [(image.shape[-2], image.shape[-1]) for image in images]
        sides = self._sides(len(given))
        if len({*zip(given, sides, strict=True)}) == 1:
            together = images if isinstance(images, torch.Tensor) else torch.stack(list(images))
            whole = self._resized(together, sides[0])
            sizes = [(whole.shape[-2], whole.shape[-1])] * len(given)
            tensors = F.pad(whole, (0, -whole.shape[-1] % DIVISIBLE, 0, -whole.shape[-2] % DIVISIBLE))
        else:
            parts = [self._resized(image[None], side)[0] for image, side in zip(images, sides, strict=True)]
            sizes = [(part.shape[-2], part.shape[-1]) for part in parts]
            tensors = self.batch_images(parts, DIVISIBLE)
        if targets:
            ratios = [[w / from_w, h / from_h] * 2 for (h, w), (from_h, from_w) in zip(sizes, given, strict=True)]
            targets = targets._replace(boxes=targets.boxes * on_device(ratios, targets.boxes.device)[:, None])
        if torch.is_autocast_enabled(tensors.device.type):  # in float32 convolutions are no faster for it, or slower
            tensors = tensors.contiguous(memory_format=torch.channels_last)
        return ImageList(tensors, sizes), targets

    def _sides(self, images: int) -> list[int]:
        """The shorter side of each image after resizing: in training one of those there are."""
        if not self.training or len(self.min_size) == 1:
            return [self.min_size[-1]] * images
        return [self.min_size[choice] for choice in torch.randint(len(self.min_size), (images,)).tolist()]

    def _resized(self, images: torch.Tensor, side: int) -> torch.Tensor:
        """(B, 3, H, W) normalised, the shorter side `side`, if the longer one is then at most `max_size`."""
        values = images if images.is_floating_point() else images.float().div_(255)
        scale = min(side / min(images.shape[-2:]), self.max_size / max(images.shape[-2:]))
        values = (values - self.mean).div_(self.std)
        return F.interpolate(values, scale_factor=scale, mode="bilinear", recompute_scale_factor=True)


def on_device(rows: list[list[float]], device: torch.device) -> torch.Tensor:
    """A small float32 tensor of the host's numbers; a GPU is not waited for."""
    return torch.tensor(rows).to(device, non_blocking=True)
