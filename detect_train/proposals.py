"""The region proposal network (Ren et al., 2015) on a feature pyramid, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from detect_train import nms
from detect_train.geometry import decode, encode, select
from detect_train.matching import match, sample
from detect_train.targets import Targets
from detect_train.transform import on_device

Losses = dict[str, torch.Tensor]
UNWEIGHTED = (1.0, 1.0, 1.0, 1.0)
BETA = 1 / 9  # where the smooth L1 loss turns from a square to a line
SHAPES = 16  # for which anchors are kept: a few MB each at 800 pixels


class Boxes(NamedTuple):
    """The proposals of B images, from the best to the worst, padded to P."""

    boxes: torch.Tensor  # (B, P, 4) float32, xyxy pixels of the padded batch
    valid: torch.Tensor  # (B, P) bool


# torchvision computes boxes in the type of the features. In bf16, with its 8 bits of mantissa, anchors and
# boxes beyond pixel 256 would stand on a grid of 2 pixels, beyond 512 of 4. So geometry stays float32 here.


class Anchors(AnchorGenerator):
    """Anchors (A, 4) in float32, whatever the features are, computed once for each shape of the batch."""

    def __init__(self, sizes: tuple[tuple[int, ...], ...], aspect_ratios: tuple[tuple[float, ...], ...]) -> None:
        super().__init__(sizes, aspect_ratios)
        self.kept: dict[object, torch.Tensor] = {}

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> torch.Tensor:
        """The same for every image, level after level, in each row after row of places."""
        device, (height, width) = feature_maps[0].device, image_list.tensors.shape[-2:]
        grids = [(level.shape[-2], level.shape[-1]) for level in feature_maps]
        key = (device, height, width, *grids)
        if key not in self.kept:
            if len(self.kept) == SHAPES:
                self.kept.clear()
            self.set_cell_anchors(torch.float32, device)
            strides = [[height // rows, width // columns] for rows, columns in grids]
            self.kept[key] = torch.cat(self.grid_anchors(grids, strides))
        return self.kept[key]


class ProposalHead(RPNHead):
    """Objectness and box offsets of every anchor, in float32."""

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        objectness, offsets = super().forward(features)
        return [level.float() for level in objectness], [level.float() for level in offsets]


class Proposals(RegionProposalNetwork):
    """torchvision's, with its parameters, its proposals and its losses; nothing in it is done image by image."""

    def forward(
        self, images: ImageList, features: Mapping[str, torch.Tensor], targets: Targets | None = None
    ) -> tuple[Boxes, Losses]:
        """Proposals, and in training the losses `loss_objectness` and `loss_rpn_box_reg`."""
        levels = list(features.values())
        per_level, offsets_per_level = self.head(levels)
        anchors = self.anchor_generator(images, levels)
        sizes = [level[0].numel() for level in per_level]
        flat, flat_offsets = concat_box_prediction_layers(per_level, offsets_per_level)
        objectness = flat.view(len(images.image_sizes), -1)  # (B, A)
        offsets = flat_offsets.view(*objectness.shape, 4)
        boxes = self.propose(objectness.detach(), offsets.detach(), anchors, sizes, images.image_sizes)
        return boxes, {} if targets is None else self.losses(objectness, offsets, anchors, targets)

    @torch.no_grad()
    def propose(
        self,
        objectness: torch.Tensor,
        offsets: torch.Tensor,
        anchors: torch.Tensor,
        sizes: list[int],
        image_sizes: list[tuple[int, int]],
    ) -> Boxes:
        """The best boxes of each image after suppression in each level.

        Args:
            objectness, offsets: (B, A), (B, A, 4).
            anchors: (A, 4), of which each level has `sizes`.
            image_sizes: height and width to which boxes are cut.
        """
        limits = on_device([[width, height] * 2 for height, width in image_sizes], objectness.device)[:, None]
        levels, scores, start = [], [], 0
        for size in sizes:
            best = objectness[:, start : start + size].topk(min(self.pre_nms_top_n(), size))
            rows = best.indices + start
            boxes = decode(select(offsets, rows), anchors[rows], UNWEIGHTED)
            boxes = boxes.clamp(min=0).minimum(limits)
            score = best.values.sigmoid()
            large = (boxes[..., 2:] - boxes[..., :2] >= self.min_size).all(dim=-1)
            levels.append((boxes, large & (score >= self.score_thresh)))
            scores.append(score)
            start += size
        stays = nms.keep_best(levels, self.nms_thresh)
        # stable: of equal scores the finer level comes first, as when torchvision sorts all of an image together
        order = torch.where(stays, torch.cat(scores, dim=1), -1).sort(dim=1, descending=True, stable=True)
        rows = order.indices[:, : self.post_nms_top_n()]
        return Boxes(select(torch.cat([boxes for boxes, _ in levels], dim=1), rows), select(stays, rows))

    def losses(
        self, objectness: torch.Tensor, offsets: torch.Tensor, anchors: torch.Tensor, targets: Targets
    ) -> Losses:
        """Of a random sample of anchors, averaged over it."""
        with torch.no_grad():
            matcher, sampler = self.proposal_matcher, self.fg_bg_sampler
            low, high = matcher.low_threshold, matcher.high_threshold
            found = match(targets, anchors[None], low=low, high=high, at_least_one=True)
            rows, positive, taken = sample(found.kind, sampler.batch_size_per_image, sampler.positive_fraction)
            own = anchors[rows]
            wanted = select(targets.boxes, select(found.nearest, rows))
            goals = encode(torch.where(positive[..., None], wanted, own), own, UNWEIGHTED)
            count = taken.sum()
        far = F.smooth_l1_loss(select(offsets, rows), goals, beta=BETA, reduction="none")
        wrong = F.binary_cross_entropy_with_logits(select(objectness, rows), positive.float(), reduction="none")
        return {
            "loss_objectness": (wrong * taken).sum() / count,
            "loss_rpn_box_reg": (far * positive[..., None]).sum() / count,
        }
