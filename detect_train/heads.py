"""The second stage (Girshick, 2015): what proposals show and where its edges are, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

from detect_train.geometry import encode, select
from detect_train.matching import match, sample
from detect_train.proposals import BETA, Boxes, Losses
from detect_train.targets import Targets

Detections = list[dict[str, torch.Tensor]]
STRIDES = {"0": 4, "1": 8, "2": 16, "3": 32}  # of the pooled levels
CANONICAL = 224  # pixels: a box of this side is pooled from level "2"
RESOLUTION = 7
SAMPLES = 2  # a side, in each of the 7 x 7 places


class Order(NamedTuple):
    """Boxes of all images sorted by the level that they are pooled from; what is not chosen is left out."""

    rows: torch.Tensor  # (n,) int64: of the flattened (B * N) boxes
    per_level: list[int]
    per_image: list[int]


def sort_by_level(boxes: torch.Tensor, chosen: torch.Tensor) -> Order:
    """The order in which the chosen of (B, N, 4) boxes are pooled; the host reads the counts, once.

    The level is equation 1 of the FPN paper (Lin et al., 2017): boxes of twice the side are pooled a level higher.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    finest, above = 2, len(STRIDES)
    level = torch.floor(4 + torch.log2(torch.sqrt((x2 - x1) * (y2 - y1)) / CANONICAL) + 1e-6)
    level = level.clamp(finest, finest + above - 1).long() - finest
    level = torch.where(chosen, level, above).flatten()
    per_level = (level[:, None] == torch.arange(above, device=level.device)).sum(dim=0)
    counts = torch.cat([per_level, chosen.sum(dim=1)]).tolist()
    rows = level.sort(stable=True).indices
    return Order(rows[: sum(counts[:above])], counts[:above], counts[above:])


class PyramidPool(nn.Module):
    """RoIAlign (He et al., 2017) from the level that suits a box's size."""

    def forward(self, features: Mapping[str, torch.Tensor], boxes: torch.Tensor, order: Order) -> torch.Tensor:
        """The features (n, C, 7, 7) of the boxes in `order` among (B, N, 4)."""
        images = order.rows.div(boxes.shape[1], rounding_mode="floor")
        rois = torch.cat([images[:, None].to(boxes.dtype), boxes.flatten(0, 1)[order.rows]], dim=1)
        return torch.cat(
            [
                roi_align(features[name], part, (RESOLUTION, RESOLUTION), 1 / stride, SAMPLES)
                for (name, stride), part in zip(STRIDES.items(), rois.split(order.per_level), strict=True)
            ]
        )


class BoxPredictor(FastRCNNPredictor):
    """Class scores and box offsets of every proposal, in float32."""

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, offsets = super().forward(features)
        return scores.float(), offsets.float()


class BoxHeads(RoIHeads):
    """torchvision's, with its parameters, its detections and its losses; training does nothing image by image."""

    def forward(
        self,
        features: Mapping[str, torch.Tensor],
        proposals: Boxes,
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Detections, Losses]:
        """In training the losses `loss_classifier` and `loss_box_reg`, else each image's detections."""
        if targets is not None:
            return [], self.losses(features, proposals, targets)
        order = sort_by_level(*proposals)
        scores, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals.boxes, order)))
        back = order.rows.argsort()  # from levels to images
        per_image = proposals.boxes.flatten(0, 1)[order.rows[back]].split(order.per_image)
        found = self.postprocess_detections(scores[back], offsets[back], list(per_image), image_shapes)
        names = ("boxes", "scores", "labels")
        return [dict(zip(names, image, strict=True)) for image in zip(*found, strict=True)], {}

    def losses(self, features: Mapping[str, torch.Tensor], proposals: Boxes, targets: Targets) -> Losses:
        """Of a random sample of proposals and true boxes, averaged over it."""
        with torch.no_grad():
            boxes, labels, wanted, taken = self.choose(proposals, targets)
            order = sort_by_level(boxes, taken)
            own, labels, wanted = (part.flatten(0, 1)[order.rows] for part in (boxes, labels, wanted))
            goals = encode(wanted, own, self.box_coder.weights)
        scores, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, order)))
        offsets = select(offsets.view(len(labels), offsets.shape[1] // 4, 4), labels[:, None])[
            :, 0
        ]  # those of the true class
        far = F.smooth_l1_loss(offsets, goals, beta=BETA, reduction="none")
        return {
            "loss_classifier": F.cross_entropy(scores, labels),
            "loss_box_reg": (far * (labels > 0)[:, None]).sum() / len(labels),
        }

    def choose(
        self, proposals: Boxes, targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each image's sample: boxes (B, M, 4), their labels (B, M), where they should be (B, M, 4), which count."""
        matcher, sampler = self.proposal_matcher, self.fg_bg_sampler
        boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)
        valid = torch.cat([proposals.valid, targets.present()], dim=1)
        low, high = matcher.low_threshold, matcher.high_threshold
        found = match(targets, boxes, low=low, high=high, at_least_one=False)
        kind = found.kind.masked_fill(~valid, -1)
        rows, positive, taken = sample(kind, sampler.batch_size_per_image, sampler.positive_fraction)
        own = select(boxes, rows)
        nearest = select(found.nearest, rows)
        labels = select(targets.labels, nearest) * positive
        return own, labels, torch.where(positive[..., None], select(targets.boxes, nearest), own), taken
