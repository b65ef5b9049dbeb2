"""Non-maximum suppression of many groups of boxes: exact, and on GPUs all groups at once.

torchvision's GPU kernel goes through the boxes of a call one after another. Groups do not affect each other, so here
they are decided side by side, by iteration towards the one set of boxes in which a box is kept if and only if no
better kept box overlaps it (Cluster-NMS: Zheng et al., 2020, arXiv:2005.03572).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torchvision.ops import nms

from detect_train.geometry import iou

ROUNDS = 16  # between two looks at whether the set changes still; most batches need no second look
ONE_BY_ONE = {"cpu"}  # device types on which looking costs nothing and comparing all pairs does


def keep_best(levels: list[tuple[torch.Tensor, torch.Tensor]], threshold: float) -> torch.Tensor:
    """Drop each box that overlaps a better one of its image and level by more than `threshold`.

    Args:
        levels: for each, boxes (B, K, 4) from the best to the worst, and (B, K) bool, which of them count.

    Returns: (B, sum of K) bool, which boxes stay.
    """
    if levels[0][0].device.type in ONE_BY_ONE:
        return torch.cat([_one_by_one(boxes, counts, threshold) for boxes, counts in levels], dim=1)
    return _all_at_once(levels, threshold)


def _one_by_one(boxes: torch.Tensor, counts: torch.Tensor, threshold: float) -> torch.Tensor:
    stays = torch.zeros_like(counts)
    falling = torch.arange(boxes.shape[1], 0, -1, dtype=boxes.dtype, device=boxes.device)
    for image in range(len(boxes)):
        own = counts[image].nonzero()[:, 0]
        kept = nms(boxes[image, own], falling[: len(own)], threshold)
        stays[image, own[kept]] = True
    return stays


def _all_at_once(levels: list[tuple[torch.Tensor, torch.Tensor]], threshold: float) -> torch.Tensor:
    images, most = len(levels[0][0]), max(boxes.shape[1] for boxes, _ in levels)
    # [g, i, j]: box i of group g, if it is kept, removes box j. Numbers, as a matrix product asks "any?" fastest
    removes = levels[0][0].new_zeros(len(levels), images, most, most, dtype=torch.bfloat16)
    for group, (boxes, _) in zip(removes, levels, strict=True):
        group[:, : boxes.shape[1], : boxes.shape[1]] = (iou(boxes, boxes) > threshold).triu_(diagonal=1)
    removes = removes.flatten(0, 1)
    valid = torch.cat([F.pad(counts, (0, most - counts.shape[1])) for _, counts in levels])[:, None]
    stays = valid.to(removes.dtype)
    while True:
        for _ in range(ROUNDS):
            before = stays
            stays = valid * (torch.bmm(before, removes) == 0).to(removes.dtype)
        if torch.equal(before, stays):
            break
    by_level = stays[:, 0].bool().split(images)
    return torch.cat([part[:, : boxes.shape[1]] for part, (boxes, _) in zip(by_level, levels, strict=True)], dim=1)
