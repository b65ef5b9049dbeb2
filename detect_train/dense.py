"""A one-stage detector of fixed shapes: FCOS (Tian et al., 2019, arXiv:1904.01355) on the R-CNN's ResNet and pyramid.

For devices that compile each shape they meet, such as XLA's: every tensor has the same shape in every step, and nothing
asks the device for a value. It runs on CPU and CUDA as well. Images are squares (`squares.py`), true boxes are padded
to one number with a mask, candidates are a fixed number an image (`regions.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from detect_train.dense_loss import Predictions, losses
from detect_train.dense_targets import Places, assign, places
from detect_train.geometry import LARGEST_GROWTH, in_float32, select
from detect_train.proposals import Losses
from detect_train.pyramid import CHANNELS, STRIDES, resnet_pyramid
from detect_train.regions import Regions, Rules
from detect_train.squares import Normalise
from detect_train.targets import Targets

# The paper has 4. At 1024 pixels each costs 13 G multiply-adds an image in each of the two towers: 2 and 2 come to
# 60 % of a ResNet-50, 4 and 4 to more than all of it.
CONVOLUTIONS = 2
GROUPS = 32  # of channels that are normalised together
PRIOR = 0.01  # of an object at a place, at the start: all the background would else drown the first steps
OVERLAP = 0.6  # IoU above which the worse of two boxes of a class is dropped


class DenseHead(nn.Module):
    """Class, sides and centerness for every place, by the same weights on all levels."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.class_tower, self.box_tower = tower(channels), tower(channels)
        self.classes = nn.Conv2d(channels, classes, 3, padding=1)
        self.sides = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.get_parameter("bias"))
        nn.init.constant_(self.classes.get_parameter("bias"), -math.log((1 - PRIOR) / PRIOR))
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))  # of the sides, one a level

    def forward(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (B, N, C), logarithms (B, N, 4) of the sides in strides, logits (B, N), in float32."""
        classes, sides, centerness = [], [], []
        for level, scale in zip(levels, self.scales.unbind(), strict=True):
            where = self.box_tower(level)
            classes.append(by_place(self.classes(self.class_tower(level))))
            sides.append(by_place(in_float32(self.sides, where)) * scale)
            centerness.append(by_place(self.centerness(where)))
        return torch.cat(classes, dim=1), torch.cat(sides, dim=1), torch.cat(centerness, dim=1)[..., 0]


class DenseDetector(nn.Module):
    """See `build`; in eval mode a `regions.SquareDetector`."""

    watched = ("head",)
    points: torch.Tensor
    strides: torch.Tensor
    ranges: torch.Tensor

    def __init__(
        self, backbone: nn.Module, head: DenseHead, *, side: int, sizes: Sequence[int], kept: int, rules: Rules
    ) -> None:
        super().__init__()
        self.normalise, self.backbone, self.head = Normalise(), backbone, head
        self.side, self.kept, self.rules = side, kept, rules
        grids = [math.ceil(side / stride) for stride in STRIDES]
        for name, values in places(grids, STRIDES, sizes)._asdict().items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: torch.Tensor, targets: Targets | None = None) -> Losses | Regions:
        """The three losses in training, else the best regions.

        Args:
            images: (B, 3, side, side) uint8; boxes are in their pixels.
        """
        assert self.training == (targets is not None), "targets are for training, and it needs them"
        pixels = self.normalise(images)
        if torch.is_autocast_enabled(images.device.type):  # as `Transform` does, and for its reason
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        classes, sides, centerness = self.head(list(self.backbone(pixels).values()))
        distances = sides.clamp(max=LARGEST_GROWTH).exp() * self.strides[:, None]
        said = Predictions(classes, distances, centerness)
        if targets is not None:
            with torch.no_grad():
                goals = assign(targets, self.places())
            return losses(said, goals)
        return self.best(said)

    def places(self) -> Places:
        return Places(self.points, self.strides, self.ranges)

    def best(self, said: Predictions) -> Regions:
        """The K best pairs of a place and a class of each image, without sorting all of them.

        They are at the K places whose best class is best, so the others are dropped first.
        """
        images, every, classes = said.classes.shape
        kept = min(self.kept, every)
        scores = (said.classes.sigmoid() * said.centerness.sigmoid()[..., None]).sqrt()
        rows = scores.amax(dim=-1).topk(kept).indices  # (B, K)
        pairs = select(scores, rows).view(images, kept * classes).topk(kept)
        own = rows.gather(1, pairs.indices.div(classes, rounding_mode="floor"))
        left, top, right, bottom = select(said.distances, own).unbind(-1)
        x, y = self.points[own].unbind(-1)
        boxes = torch.stack([x - left, y - top, x + right, y + bottom], dim=-1)
        return Regions(boxes, pairs.values, pairs.indices.remainder(classes) + 1)


def tower(channels: int) -> nn.Sequential:
    """Convolutions that see one level at a time; groups of channels, since a batch has few images."""
    layers: list[nn.Module] = []
    for _ in range(CONVOLUTIONS):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(GROUPS, channels), nn.ReLU()]
    return nn.Sequential(*layers)


def by_place(features: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H * W, C) in float32."""
    return features.float().flatten(2).transpose(1, 2)


def build(
    *,
    num_classes: int,
    backbone: str,
    trainable_layers: int,
    norm: str,
    max_size: int,
    anchor_sizes: Sequence[int],
    proposals_test: int,
    score_threshold: float,
    detections_per_image: int,
) -> DenseDetector:
    """Arguments as in `config.Model`.

    Args:
        num_classes: with the background, which is class 0.
    """
    return DenseDetector(
        resnet_pyramid(backbone, norm, trainable_layers),
        DenseHead(CHANNELS, num_classes - 1),
        side=max_size,
        sizes=anchor_sizes,
        kept=proposals_test,
        rules=Rules(score_threshold, OVERLAP, detections_per_image),
    )
