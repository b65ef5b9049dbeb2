"""The second stage: what a crop shows and where the object's edges are; and the sample of crops it learns from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from detect_train.geometry import Weights, encode, select
from detect_train.matching import match
from detect_train.proposals import BETA, Losses
from detect_train.targets import Targets
from detect_train.two_stage.config import DIVISIBLE
from detect_train.two_stage.crops import crop, enlarge
from detect_train.two_stage.unet import LEVELS, encoder

CONTEXT = 1.25  # side of a crop, in its box's: what is around an object tells what it is, and where it ends
SHIFT, STRETCH = 0.15, 0.25  # of a jittered box: at most, in its sides; of the logarithm of a side
OVERLAP = 0.5  # IoU with an object from which on a box stands for it
FAR = 0.4  # below this with every object it is background; between the two it is neither
WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)  # of the offsets, as in Faster R-CNN


class Noise(NamedTuple):
    """The random numbers of a training step, drawn by the host: the same whatever the device.

    From a generator of their own: a thread that loads images for XLA uses the common one at the same time.
    """

    shift: torch.Tensor  # (B, G, 4) in [-1, 1): of each object's second box
    order: torch.Tensor  # (B, K + G) in [0, 1): the highest are taken

    @staticmethod
    def draw(targets: Targets, proposals: int, seed: int) -> Noise:
        images, objects = targets.labels.shape
        own = torch.Generator().manual_seed(seed)
        shift, order = (torch.rand(images, *size, generator=own) for size in ((objects, 4), (proposals + objects,)))
        return Noise(shift * 2 - 1, order)

    def to(self, device: torch.device) -> Noise:
        return Noise(*(part.to(device, non_blocking=True) for part in self))


class Sample(NamedTuple):
    """M boxes of each image, those that stand for objects first."""

    boxes: torch.Tensor  # (B, M, 4) xyxy pixels
    labels: torch.Tensor  # (B, M) int64, 0: background
    wanted: torch.Tensor  # (B, M, 4): the object's box, or the box itself
    taken: torch.Tensor  # (B, M) bool: it counts; there may be fewer than M


class CropClassifier(nn.Module):
    """A ResNet over crops of `side` pixels: scores of `num_classes`, 0 the background, and four offsets."""

    def __init__(self, *, backbone: str, num_classes: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.backbone, (channels,) = encoder(backbone, LEVELS[-1:])
        self.cells = side // DIVISIBLE  # a side of the last map
        self.scores = nn.Linear(channels, num_classes)
        # from every place of the last map: its average would not say where the edges are
        self.offsets = nn.Linear(channels * self.cells**2, 4)
        for layer in (self.scores, self.offsets):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, images: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (B, M, classes) and offsets (B, M, 4), float32, of `boxes` (B, M, 4) in normalised `images`."""
        crops = crop(images, enlarge(boxes, CONTEXT), self.side)
        last = self.backbone["body"](crops)[LEVELS[-1]]
        # as large as an average: the more inputs, the faster a layer learns, and this one would overshoot
        places = last.flatten(1) / self.cells
        scores, offsets = self.scores(last.mean(dim=(2, 3))), self.offsets(places)
        return scores.float().unflatten(0, boxes.shape[:2]), offsets.float().unflatten(0, boxes.shape[:2])

    def new_parts(self) -> nn.ModuleList:
        """What no pretraining has seen."""
        return nn.ModuleList([self.scores, self.offsets])


@torch.no_grad()
def choose(proposals: torch.Tensor, targets: Targets, noise: Noise, size: int) -> Sample:
    """`size` boxes of each image's `proposals` (B, K, 4) and of its objects' boxes, moved a little.

    Half of them stand for an object, if there are as many of each kind; an object that the U-Net misses counts too,
    as each brings a box of its own. A class with few objects in an image is drawn as often as one with many.
    """
    boxes = torch.cat([proposals, jittered(targets.boxes, noise.shift)], dim=1)  # (B, N, 4)
    found = match(targets, boxes, low=FAR, high=OVERLAP, at_least_one=False)
    valid = torch.cat([torch.ones_like(proposals[..., 0], dtype=torch.bool), targets.present()], dim=1)
    valid &= found.kind >= 0
    positive = valid & (found.kind > 0)
    labels = select(targets.labels, found.nearest) * positive
    alike = (labels[:, :, None] == labels[:, None, :]).sum(dim=2)
    # a draw of weight 1 / alike (Efraimidis & Spirakis, 2006)
    objects = torch.where(positive, noise.order.pow(alike), -1)
    least = objects.topk(size // 2).values[:, -1:]  # -1 where there are not so many
    # first half the objects, then background, then what fills up: the other objects, and last what is no box
    rank = 2 * (positive & (objects >= least)) + 1 * (valid & ~positive) - 1 * ~valid
    best = (rank + noise.order).topk(size)
    own, nearest, label = (select(part, best.indices) for part in (boxes, found.nearest, labels))
    return Sample(
        own,
        label,
        torch.where(label[..., None] > 0, select(targets.boxes, nearest), own),
        best.values >= 0,
    )


def jittered(boxes: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Boxes (..., 4) moved and stretched by at most `SHIFT` and `STRETCH`, as `shift` (..., 4) in [-1, 1] says."""
    low, high = boxes.split(2, dim=-1)
    move, stretch = shift.split(2, dim=-1)
    sides = high - low
    middle, half = (low + high) / 2 + SHIFT * move * sides, sides / 2 * torch.exp(STRETCH * stretch)
    return torch.cat([middle - half, middle + half], dim=-1)


def losses(scores: torch.Tensor, offsets: torch.Tensor, sample: Sample) -> Losses:
    """Classes of the boxes that were taken, edges of those that stand for an object; both as averages of all taken."""
    wrong = F.cross_entropy(scores.flatten(0, 1), sample.labels.flatten(), reduction="none")
    objects = sample.labels > 0
    goals = encode(sample.wanted, sample.boxes, WEIGHTS)  # of filled-up rows without an area not finite
    far = F.smooth_l1_loss(offsets, torch.where(objects[..., None], goals, 0.0), beta=BETA, reduction="none")
    taken = sample.taken.flatten()
    count = taken.sum().clamp(min=1)
    return {
        "loss_class": (wrong * taken).sum() / count,
        "loss_box": (far.sum(dim=-1) * objects).sum() / count,
    }
