"""The two stages as one detector of fixed shapes: proposals of a trained U-Net, each looked at by a classifier."""

from __future__ import annotations

import torch
from torch import nn

from detect_train.geometry import decode, select
from detect_train.proposals import Losses
from detect_train.regions import Regions, Rules
from detect_train.targets import Targets
from detect_train.two_stage.classifier import WEIGHTS, CropClassifier, Noise, choose, losses
from detect_train.two_stage.unet import UNet


class TwoStage(nn.Module):
    """A `regions.SquareDetector`. Training is the classifier's: the U-Net stays as it is given, statistics too.

    Args:
        samples: boxes of an image that a training step looks at.
    """

    watched = ("unet.answer", "classifier.scores", "classifier.offsets")

    def __init__(self, unet: UNet, classifier: CropClassifier, *, samples: int, rules: Rules) -> None:
        super().__init__()
        self.unet, self.classifier, self.samples = unet.requires_grad_(False), classifier, samples
        self.side, self.rules = unet.side, rules

    def train(self, mode: bool = True) -> TwoStage:
        super().train(mode)
        self.unet.eval()
        return self

    def forward(
        self, images: torch.Tensor, targets: Targets | None = None, noise: Noise | None = None
    ) -> Losses | Regions:
        """The classifier's two losses in training, else as many regions as there are proposals.

        Args:
            images: (B, 3, side, side) uint8; boxes are in its pixels.
            noise: `Noise.draw`'s, in training.
        """
        assert self.training == (targets is not None) == (noise is not None), "both are for training, which needs them"
        pixels = self.unet.normalise(images)
        with torch.no_grad():
            boxes, likely = self.unet.propose(self.unet.maps(pixels))
        if targets is not None and noise is not None:
            sample = choose(boxes, targets, noise, self.samples)
            scores, offsets = self.classifier(pixels, sample.boxes)
            return losses(scores, offsets, sample)
        scores, offsets = self.classifier(pixels, boxes)
        return best_pairs(decode(offsets, boxes, WEIGHTS), likely, scores)


def best_pairs(boxes: torch.Tensor, likely: torch.Tensor, scores: torch.Tensor) -> Regions:
    """Of boxes (B, K, 4), each as any of the C classes, the K best.

    The score is the geometric mean of the two stages' (CenterNet2: Zhou et al., 2021, arXiv:2103.07461).

    Args:
        likely: (B, K), that there is an object.
        scores: (B, K, 1 + C), logits; 0 is the background.
    """
    classes = scores.softmax(dim=-1)[..., 1:]  # (B, K, C)
    best = (classes * likely[..., None]).sqrt().flatten(1).topk(boxes.shape[1])
    rows = best.indices.div(classes.shape[-1], rounding_mode="floor")
    return Regions(select(boxes, rows), best.values, 1 + best.indices - rows * classes.shape[-1])


def build(
    *,
    num_classes: int,
    backbone: str,
    side: int,
    width: int,
    proposals: int,
    crop_side: int,
    samples: int,
    score_threshold: float,
    overlap: float,
    detections_per_image: int,
) -> TwoStage:
    """Both stages with random weights; nothing is downloaded. Arguments as in `config.Model`.

    Args:
        num_classes: with the background, which is class 0.
    """
    return TwoStage(
        UNet(backbone=backbone, side=side, width=width, proposals=proposals),
        CropClassifier(backbone=backbone, num_classes=num_classes, side=crop_side),
        samples=samples,
        rules=Rules(score_threshold, overlap, detections_per_image),
    )
