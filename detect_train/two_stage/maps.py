"""What the U-Net should say of every place, drawn from boxes, and how wrong it is. Shapes never depend on values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from detect_train.proposals import Losses
from detect_train.targets import Targets

STRIDE = 4  # pixels a side of a place
SPREAD = 0.1  # standard deviation of an object's Gaussian, in its width and height
NARROWEST = 1.0  # of a Gaussian, in places: less, and the places around a small object's centre learn nothing of it
UNIT = 1 / 8  # of the square's side: an object of this side has extents 0


class Maps(NamedTuple):
    """The U-Net's answer for each of H x W places, float32."""

    mask: torch.Tensor  # (B, H, W) logit: inside a box
    centre: torch.Tensor  # (B, H, W) logit: an object's centre
    extents: torch.Tensor  # (B, 2, H, W): log of width and height of the object there, in `UNIT`


class Goals(NamedTuple):
    """What `Maps` should be."""

    mask: torch.Tensor  # (B, H, W) float32, 1 inside a box
    centre: torch.Tensor  # (B, H, W) float32, 1 at the centres, falling off around them as Gaussians do
    peak: torch.Tensor  # (B, H, W) bool: the place of a centre
    extents: torch.Tensor  # (B, 2, H, W)
    weight: torch.Tensor  # (B, H, W) float32 of the extents: at most 1 in sum over an object's places


def goals(targets: Targets, places: int) -> Goals:
    """Masks, centres and extents of boxes in pixels of a square of `places` x `places`.

    A place belongs to the object whose Gaussian is the highest there. All places under it learn its extents, which
    is what lets a short training do (TTFNet: Liu et al., 2020, arXiv:1909.00700).
    """
    low, high = targets.boxes.div(STRIDE).split(2, dim=-1)  # (B, G, 2): x, y
    middle = (low + high) / 2
    present = targets.present()[..., None]
    grid = torch.arange(places, device=low.device, dtype=low.dtype)  # of x and, the square being one, of y
    spread = ((high - low) * SPREAD).clamp(min=NARROWEST)[..., None]  # (B, G, 2, 1)
    bell = torch.exp(-0.5 * ((grid + 0.5 - middle[..., None]) / spread).square())  # (B, G, 2, P)
    at = (grid == middle.floor()[..., None]) & present[..., None]
    inside = (grid + 0.5 >= low[..., None]) & (grid + 0.5 < high[..., None]) & present[..., None]
    peaks = _outer(at)  # (B, G, H, W)
    heat = torch.where(peaks, 1.0, _outer(bell) * present[..., None])
    centre, owner = heat.max(dim=1)
    share = heat / heat.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    extents = (targets.boxes[..., 2:] - targets.boxes[..., :2]).clamp(min=1) / (UNIT * STRIDE * places)
    rows = owner.flatten(1)[..., None].expand(-1, -1, 2)  # (B, H * W, 2)
    wanted = extents.log().gather(1, rows).transpose(1, 2).unflatten(2, owner.shape[1:])
    return Goals(
        mask=(_outer(inside) | peaks).any(dim=1).float(),
        centre=centre,
        peak=peaks.any(dim=1),
        extents=wanted,
        weight=share.gather(1, owner[:, None])[:, 0],
    )


def _outer(sides: torch.Tensor) -> torch.Tensor:
    """(B, G, 2, P) along x and y -> their product (B, G, P, P) at y, x."""
    x, y = sides.unbind(dim=2)
    return y[..., :, None] * x[..., None, :]


def losses(maps: Maps, wanted: Goals, targets: Targets) -> Losses:
    """Of the masks per place, of centres and extents per object.

    The centres' is CenterNet's (Zhou et al., 2019, arXiv:1904.07850, equation 1): a focal loss that forgives places
    near a centre.
    """
    objects = targets.counts.sum().clamp(min=len(targets.counts))  # a batch with few weighs no more than others
    score = maps.centre.sigmoid()
    missed = (1 - score).square() * F.logsigmoid(maps.centre)
    false = (1 - wanted.centre).pow(4) * score.square() * F.logsigmoid(-maps.centre)
    far = (maps.extents - wanted.extents).abs().sum(dim=1)
    return {
        "loss_mask": F.binary_cross_entropy_with_logits(maps.mask, wanted.mask),
        "loss_centre": -torch.where(wanted.peak, missed, false).sum() / objects,
        "loss_extents": (far * wanted.weight).sum() / objects,
    }
