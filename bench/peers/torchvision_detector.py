"""torchvision's Faster R-CNN with a feature pyramid, as its references/detection trains it, in given sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

NORMS: dict[str, Callable[..., nn.Module]] = {"frozen": FrozenBatchNorm2d, "train": nn.BatchNorm2d}


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
    """Its own modules; arguments as of `detect_train.model.build`, which gives the same names to the same weights."""
    return FasterRCNN(
        resnet_fpn_backbone(
            backbone_name=backbone, weights=None, norm_layer=NORMS[norm], trainable_layers=trainable_layers
        ),
        num_classes,
        min_size=list(min_size),
        max_size=max_size,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=proposals_train,
        rpn_post_nms_top_n_train=proposals_train,
        rpn_pre_nms_top_n_test=proposals_test,
        rpn_post_nms_top_n_test=proposals_test,
        box_batch_size_per_image=box_batch_size,
        box_score_thresh=score_threshold,
        box_detections_per_img=detections_per_image,
    )
