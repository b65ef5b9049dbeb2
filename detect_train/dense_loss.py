"""The losses of a dense detector: equation 2 of FCOS (arXiv:1904.01355) with GIoU in the place of IoU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from detect_train.dense_targets import RADIUS, Goals
from detect_train.proposals import Losses

OBJECT = (2 * RADIUS) ** 2  # places that stand for an object, about
ALPHA, GAMMA = 0.25, 2.0  # weight of the objects' classes, and how little what is right already counts


class Predictions(NamedTuple):
    """What the N places of B images say, in float32."""

    classes: torch.Tensor  # (B, N, C) logits
    distances: torch.Tensor  # (B, N, 4) above 0, in pixels
    centerness: torch.Tensor  # (B, N) logits


def losses(said: Predictions, goals: Goals) -> Losses:
    """`loss_classifier`, `loss_box_reg` and `loss_centerness`, divided by the number of places that stand for objects.

    The first, a sum over all places, by that of an object an image at least: else a batch that shows none would change
    the weights as much as fifty others.
    """
    positive = (goals.labels > 0).float()
    found = positive.sum()
    own, all_places = found.clamp(min=1), found.clamp(min=OBJECT * len(positive))
    classes = torch.arange(1, said.classes.shape[-1] + 1, device=goals.labels.device)
    wanted = (goals.labels[..., None] == classes).float()
    far = 1 - giou(said.distances, goals.distances)
    off = F.binary_cross_entropy_with_logits(said.centerness, goals.centerness, reduction="none")
    return {
        "loss_classifier": focal(said.classes, wanted).sum() / all_places,
        "loss_box_reg": (far * positive).sum() / own,
        "loss_centerness": (off * positive).sum() / own,
    }


def focal(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The focal loss (Lin et al., 2017, arXiv:1708.02002, equation 5) of each logit against 0 or 1."""
    probability = logits.sigmoid()
    wrong = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    miss = probability + wanted - 2 * probability * wanted  # 1 - p_t
    return (ALPHA * wanted + (1 - ALPHA) * (1 - wanted)) * wrong * miss**GAMMA


def giou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """GIoU (Rezatofighi et al., 2019, equation 1) of boxes given by their distances (..., 4), above 0, from one point.

    That point is in both, so they overlap, and sides of the box shared and the box around follow from min and max.
    """

    def area(distances: torch.Tensor) -> torch.Tensor:
        left, top, right, bottom = distances.unbind(-1)
        return (left + right) * (top + bottom)

    shared = area(torch.minimum(first, second))
    union = area(first) + area(second) - shared
    around = area(torch.maximum(first, second))
    return shared / union - (around - union) / around
