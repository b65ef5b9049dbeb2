"""Faster R-CNN (Ren et al., 2015) on a ResNet with a feature pyramid (Lin et al., 2017), from torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from utils.images import MEAN, STD

# Layers, not modes: `.train()` cannot thaw a frozen one. On one rank SyncBatchNorm is BatchNorm2d.
NORMS = {"frozen": FrozenBatchNorm2d, "sync": nn.SyncBatchNorm, "train": nn.BatchNorm2d}
POOLED_LEVELS = ["0", "1", "2", "3"]  # strides 4 to 32; large boxes are pooled from coarse levels
ASPECT_RATIOS = (0.5, 1.0, 2.0)
BOX_FEATURES = 1024


def build(
    *,
    num_classes: int,
    backbone: str,
    trainable_layers: int,
    norm: str,
    min_size: Sequence[int],
    max_size: int,
    anchor_sizes: Sequence[int],
    proposals_train: int,
    proposals_test: int,
    box_batch_size: int,
    score_threshold: float,
    detections_per_image: int,
) -> FasterRCNN:
    """A detector with random weights; nothing is downloaded. Arguments as in `config.Model`.

    It takes lists of images (3, H, W), uint8 or float in [0, 1], of any sizes, and resizes and normalises
    them itself; boxes are xyxy pixels of the image given.

    Args:
        num_classes: with the background, which is class 0.
    """
    pyramid = resnet_fpn_backbone(
        backbone_name=backbone, weights=None, norm_layer=NORMS[norm], trainable_layers=trainable_layers
    )
    anchors = Anchors(tuple((size,) for size in anchor_sizes), (ASPECT_RATIOS,) * len(anchor_sizes))
    model = FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        rpn_head=ProposalHead(pyramid.out_channels, len(ASPECT_RATIOS)),
        rpn_pre_nms_top_n_train=proposals_train,
        rpn_post_nms_top_n_train=proposals_train,
        rpn_pre_nms_top_n_test=proposals_test,
        rpn_post_nms_top_n_test=proposals_test,
        box_roi_pool=MultiScaleRoIAlign(POOLED_LEVELS, output_size=7, sampling_ratio=2),
        box_predictor=BoxPredictor(BOX_FEATURES, num_classes),
        box_batch_size_per_image=box_batch_size,
        box_score_thresh=score_threshold,
        box_detections_per_img=detections_per_image,
    )
    model.transform = Transform(list(min_size), max_size, list(MEAN), list(STD))
    return model


def from_checkpoint(content: Mapping[str, Any]) -> tuple[FasterRCNN, tuple[str, ...]]:
    """The detector and the class names (label 1 first) of a checkpoint, which needs no other file."""
    model = build(**content["architecture"])
    model.load_state_dict(content["model"])
    return model, tuple(content["classes"])


class Transform(GeneralizedRCNNTransform):
    """torchvision's, for uint8 images too: a quarter of the bytes between loader and device."""

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        return super().normalize(image if image.is_floating_point() else image.float() / 255)


# torchvision computes boxes in the type of the features. In bf16, with its 8 bits of mantissa, anchors and
# boxes beyond pixel 256 would stand on a grid of 2 pixels, beyond 512 of 4. So geometry stays float32 here.


class Anchors(AnchorGenerator):
    """Anchors in float32 whatever the features are."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class ProposalHead(RPNHead):
    """Objectness and box offsets of every anchor, in float32."""

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        objectness, offsets = super().forward(features)
        return [level.float() for level in objectness], [level.float() for level in offsets]


class BoxPredictor(FastRCNNPredictor):
    """Class scores and box offsets of every proposal, in float32."""

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, offsets = super().forward(features)
        return scores.float(), offsets.float()
