"""Each kind of detector by its head's name; and Faster R-CNN (Ren et al., 2015) on a ResNet with a feature pyramid (Lin
et al., 2017), from torchvision's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detect_train import dense
from detect_train.heads import RESOLUTION, BoxHeads, BoxPredictor, Detections, PyramidPool
from detect_train.norms import NORMS
from detect_train.proposals import Anchors, Losses, ProposalHead, Proposals
from detect_train.targets import Images, Targets
from detect_train.transform import Transform
from detect_train.two_stage import model as two_stage

ASPECT_RATIOS = (0.5, 1.0, 2.0)
BOX_FEATURES = 1024


class Detector(GeneralizedRCNN):
    """torchvision's Faster R-CNN by its parameters, losses and detections, with a training step for whole batches.

    A step asks the device for a result twice, whatever the batch, where torchvision does about ten times an image.
    """

    def forward(self, images: Images, targets: Targets | None = None) -> Losses | Detections:
        """The four losses in training, else each image's `boxes`, `scores` and `labels`, from the best to the worst.

        Args:
            images: (3, H, W) each, uint8 or float in [0, 1], of any sizes; boxes are in their pixels.
        """
        assert self.training == (targets is not None), "targets are for training, and it needs them"
        given = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, resized = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        proposals, proposal_losses = self.rpn(batch, features, resized)
        detections, losses = self.roi_heads(features, proposals, batch.image_sizes, resized)
        if targets is not None:
            return {**losses, **proposal_losses}
        return self.transform.postprocess(detections, batch.image_sizes, given)


def build(*, head: str = "rcnn", **architecture: Any) -> Any:
    """The detector of an architecture, with random weights; nothing is downloaded.

    Args:
        head: a key of `BUILDERS`, to which the rest goes; old checkpoints, of R-CNNs all, do not name it.
    """
    return BUILDERS[head](**architecture)


def faster_rcnn(
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
) -> Detector:
    """Arguments as in `config.Model`.

    Args:
        num_classes: with the background, which is class 0.
    """
    pyramid = resnet_fpn_backbone(
        backbone_name=backbone, weights=None, norm_layer=NORMS[norm], trainable_layers=trainable_layers
    )
    kept = {"training": proposals_train, "testing": proposals_test}
    proposals = Proposals(
        Anchors(tuple((size,) for size in anchor_sizes), (ASPECT_RATIOS,) * len(anchor_sizes)),
        ProposalHead(pyramid.out_channels, len(ASPECT_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=kept,
        post_nms_top_n=dict(kept),
        nms_thresh=0.7,
    )
    predictor = BoxPredictor(BOX_FEATURES, num_classes)
    heads = BoxHeads(
        PyramidPool(),
        TwoMLPHead(pyramid.out_channels * RESOLUTION**2, BOX_FEATURES),
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=box_batch_size,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=score_threshold,
        nms_thresh=0.5,
        detections_per_img=detections_per_image,
    )
    return Detector(pyramid, proposals, heads, Transform(tuple(min_size), max_size))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "rcnn": faster_rcnn,
    "dense": dense.build,
    "two_stage": two_stage.build,
}


def from_checkpoint(content: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """The detector and the class names (label 1 first) of a checkpoint, which needs no other file."""
    model = build(**content["architecture"])
    model.load_state_dict(content["model"])
    return model, tuple(content["classes"])
