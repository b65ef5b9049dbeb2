"""The U-Net (Ronneberger et al., 2015): a ResNet's features, refined step by step to a quarter of the resolution.

It proposes regions as CenterNet does (Zhou et al., 2019, arXiv:1904.07850): by the peaks of a map of centres, so that
objects whose masks touch stay apart.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter

from detect_train.geometry import in_float32, select
from detect_train.proposals import Losses
from detect_train.pyramid import doubled
from detect_train.regions import Regions, Rules
from detect_train.squares import Normalise
from detect_train.targets import Targets
from detect_train.two_stage.maps import STRIDE, UNIT, Maps, goals, losses

LEVELS = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet, at strides 4, 8, 16 and 32
RARE = -2.2  # logit of the centres' first probability, 0.1: at 0.5 the many places without one are all that is learnt
SMALLEST = 2.0  # pixels, side of a proposal


def encoder(backbone: str, levels: tuple[str, ...]) -> tuple[nn.ModuleDict, list[int]]:
    """A ResNet with random weights as `backbone.load_backbone` fills it, and the channels of its `levels`."""
    resnet = get_model(backbone, weights=None)
    widths = [resnet.fc.in_features // 2 ** (len(LEVELS) - 1 - LEVELS.index(level)) for level in levels]
    return nn.ModuleDict({"body": IntermediateLayerGetter(resnet, {level: level for level in levels})}), widths


class Up(nn.Module):
    """Features of twice the resolution from deep ones and from the encoder's of that resolution."""

    def __init__(self, deep: int, skip: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(deep + skip, out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, deep: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(torch.cat([doubled(deep), skip], dim=1))))


class UNet(nn.Module):
    """Args: see `config.Model`; `width` is the channels of the finest level, a coarser one has twice as many.

    A `regions.SquareDetector` of one class, object, of which nothing is suppressed: its recall is validated.
    """

    watched = ("answer",)

    def __init__(self, *, backbone: str, side: int, width: int, proposals: int) -> None:
        super().__init__()
        self.side, self.proposals = side, proposals
        self.rules = Rules(score_threshold=0, overlap=1, most=proposals)
        self.normalise = Normalise()
        self.backbone, channels = encoder(backbone, LEVELS)
        widths = [width, 2 * width, 4 * width, channels[-1]]
        self.ups = nn.ModuleList(Up(widths[i + 1], channels[i], widths[i]) for i in range(3))
        self.head = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.answer = nn.Conv2d(2 * width, 4, 1)
        self.answer.bias = nn.Parameter(torch.tensor([0.0, RARE, 0.0, 0.0]))

    def new_parts(self) -> nn.ModuleList:
        """What no pretraining has seen."""
        return nn.ModuleList([self.ups, self.head, self.answer])

    def forward(self, images: torch.Tensor, targets: Targets | None = None) -> Losses | Regions:
        """The losses of its maps in training, else its proposals, all of label 1.

        Args:
            images: (B, 3, side, side) uint8; boxes are in its pixels.
        """
        assert self.training == (targets is not None), "targets are for training, and it needs them"
        maps = self.maps(self.normalise(images))
        if targets is not None:
            return losses(maps, goals(targets, self.side // STRIDE), targets)
        boxes, scores = self.propose(maps)
        return Regions(boxes, scores, torch.ones_like(scores, dtype=torch.int64))

    def maps(self, images: torch.Tensor) -> Maps:
        """Of normalised images."""
        features = self.backbone["body"](images)
        deep = features[LEVELS[-1]]
        for i in (2, 1, 0):
            deep = self.ups[i](deep, features[LEVELS[i]])
        answer = in_float32(self.answer, F.relu(self.head(deep)))
        return Maps(answer[:, 0], answer[:, 1], answer[:, 2:])

    @torch.no_grad()
    def propose(self, maps: Maps) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (B, K, 4) in pixels and scores (B, K), from the best to the worst.

        They stand on the highest peaks of the centres inside masks. K it is always: where there are fewer peaks, the
        other places follow, with score 0.
        """
        peak = F.max_pool2d(maps.centre, 3, stride=1, padding=1) == maps.centre
        score = maps.centre.sigmoid() * maps.mask.sigmoid()
        best = torch.where(peak, score, score - 1).flatten(1).topk(self.proposals)
        columns = maps.centre.shape[-1]
        rows = best.indices.div(columns, rounding_mode="floor")
        middle = torch.stack([best.indices - rows * columns, rows], dim=-1).float().add(0.5).mul(STRIDE)
        extents = select(maps.extents.flatten(2).transpose(1, 2), best.indices)
        unit = UNIT * self.side
        half = extents.clamp(math.log(SMALLEST / unit), math.log(1 / UNIT)).exp() * (unit / 2)
        boxes = torch.cat([middle - half, middle + half], dim=-1).clamp(0, self.side)
        return boxes, best.values.clamp(min=0)
