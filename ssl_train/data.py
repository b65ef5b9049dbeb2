"""Whole batches of two random views of each unlabelled image, made by loader processes, finished on the device."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from ssl_train import augment_device, augment_opencv, augment_pil
from ssl_train.augment import Streams, View, draw
from utils.image_cache import Images
from utils.images import MEAN, STD

MAKE = {"opencv": augment_opencv.apply, "pil": augment_pil.apply, "device": augment_opencv.crop}


class Share(NamedTuple):
    """What one rank makes of a global batch."""

    epoch: int
    query: np.ndarray  # (n,) int64: the images of its query views
    key: np.ndarray  # (n,) int64: those of its key views
    order: np.ndarray  # (N,) int64: which example of the global batch stands at each place of the keys' batch


class Batch(NamedTuple):
    """The views of a `Share`, or what they are made of on the device: crops, or whole images."""

    query: torch.Tensor  # (n, S, S, 3) uint8: views, crops when there are `numbers`; (n,) int64: places in `images`
    key: torch.Tensor  # likewise
    order: torch.Tensor  # (N,) int64
    side: int  # S
    numbers: torch.Tensor | None = None  # (2n, ...) float32, see augment_device.numbers; query views first
    images: torch.Tensor | None = None  # (m, H, W, 3) uint8, each once


class Views(Dataset[Batch]):
    """`Share` -> `Batch`. An image is read once for both of its views.

    A view depends on (seed, epoch, image, which of the two) alone, whatever process makes it. Who makes views of
    crops: this process for the back ends "opencv" and "pil", `to_device` for "device".
    """

    def __init__(
        self,
        source: Images,
        *,
        seed: int,
        backend: str,
        image_size: int,
        crop_scale: tuple[float, ...],
        jitter: tuple[float, ...],
        jitter_p: float,
        grayscale_p: float,
        blur_p: float,
        blur_sigma: tuple[float, ...],
    ) -> None:
        self.source, self.seed, self.backend, self.side = source, seed, backend, image_size
        self.sigma = blur_sigma[1]
        self.how: dict[str, Any] = {
            "crop_scale": crop_scale, "jitter": jitter, "jitter_p": jitter_p,
            "grayscale_p": grayscale_p, "blur_p": blur_p, "blur_sigma": blur_sigma,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, share: Share) -> Batch:
        n, order = len(share.query), torch.from_numpy(share.order)
        streams = Streams(self.seed, share.epoch)
        wanted, places = np.unique(np.concatenate((share.query, share.key)), return_inverse=True)

        def view(row: int, height: int, width: int) -> View:
            return draw(streams.at(int(wanted[places[row]]), row >= n), width, height, **self.how)

        self.source.ahead(wanted.tolist())
        if whole := self._delivered_whole():
            images = _stacked([self.source.pixels(index) for index in wanted.tolist()])
            numbers = augment_device.numbers([view(row, *whole) for row in range(2 * n)], self.sigma)
            query, key = torch.from_numpy(places).split(n)
            return Batch(query, key, order, self.side, numbers, images)
        views: dict[int, View] = {}
        made: dict[int, np.ndarray] = {}
        for place, index in enumerate(wanted.tolist()):
            image = self.source.pixels(index)
            for row in np.flatnonzero(places == place).tolist():
                views[row] = view(row, *image.shape[:2])
                made[row] = MAKE[self.backend](image, views[row], self.side)
        query, key = (_stacked([made[row] for row in rows]) for rows in (range(n), range(n, 2 * n)))
        if self.backend != "device":
            return Batch(query, key, order, self.side)
        numbers = augment_device.numbers([views[row] for row in range(2 * n)], self.sigma)
        return Batch(query, key, order, self.side, numbers)

    def _delivered_whole(self) -> tuple[int, int] | None:
        """Height and width of all images if the device crops: when they are not decoded here, and no larger than two
        crops are.
        """
        size = self.source.same_size if self.backend == "device" else None
        return size if size and size[0] * size[1] <= 2 * self.side**2 else None


def _stacked(pixels: list[np.ndarray]) -> torch.Tensor:
    """(n, ...), in a loader process right in the memory that it shares with the main process."""
    return default_collate([torch.from_numpy(each) for each in pixels])


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The query and the key views, (n, 3, S, S) float32 in channels_last, normalised, on `device`."""
    query, key = batch.query.to(device, non_blocking=True), batch.key.to(device, non_blocking=True)
    if batch.numbers is None:
        return _normalised(query), _normalised(key)
    both, numbers = torch.cat((query, key)), batch.numbers.to(device, non_blocking=True)
    if batch.images is not None:
        images = batch.images.to(device, non_blocking=True).index_select(0, both)
        views = augment_device.apply(images, numbers, batch.side)
    else:
        views = augment_device.apply(both, numbers, None)
    return views[: len(query)], views[len(query) :]


def _normalised(views: torch.Tensor) -> torch.Tensor:
    mean, deviation = _statistics(views.device)
    return views.permute(0, 3, 1, 2).float().sub_(mean).div_(deviation)


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's, in levels of 8 bits, (3, 1, 1): made once, since copying numbers to a GPU waits for it."""
    mean, deviation = ((torch.tensor(numbers)[:, None, None] * 255).to(device) for numbers in (MEAN, STD))
    return mean, deviation
