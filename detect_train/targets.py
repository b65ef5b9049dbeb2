"""Batches as the loader makes them and the device gets them: few tensors, whose shapes the host knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

Images = torch.Tensor | Sequence[torch.Tensor]  # (B, 3, H, W), or (3, H, W) each where sizes differ


class Targets(NamedTuple):
    """The objects of B images, padded with zeros to the G of the image that has most, or to a fixed G."""

    boxes: torch.Tensor  # (B, G, 4) float32, xyxy pixels
    labels: torch.Tensor  # (B, G) int64 in 1..C
    counts: torch.Tensor  # (B,) int64: how many are the image's own

    def present(self) -> torch.Tensor:
        """(B, G) bool: which rows are no padding."""
        return torch.arange(self.boxes.shape[1], device=self.boxes.device) < self.counts[:, None]


class Batch(NamedTuple):
    images: Images  # uint8, or float in [0, 1]
    targets: Targets

    def to(self, device: torch.device) -> Batch:
        """On the device; nothing waits for copies out of pinned memory."""
        targets = Targets(*(part.to(device, non_blocking=True) for part in self.targets))
        return Batch(to_device(self.images, device), targets)


def to_device(images: Images, device: torch.device) -> Images:
    """On the device; nothing waits for copies out of pinned memory."""
    if isinstance(images, torch.Tensor):
        return images.to(device, non_blocking=True)
    return [image.to(device, non_blocking=True) for image in images]


def pad(targets: Sequence[Mapping[str, Any]], rows: int = 1) -> Targets:
    """Targets of single images, `boxes` (k, 4) and `labels` (k,), as one of at least `rows` objects."""
    boxes, labels = ([torch.as_tensor(target[name]) for target in targets] for name in ("boxes", "labels"))
    counts = torch.tensor([len(part) for part in boxes])
    rows = max(rows, *map(len, boxes))
    padded = Targets(boxes[0].new_zeros(len(boxes), rows, 4), labels[0].new_zeros(len(boxes), rows), counts)
    for image, (some_boxes, some_labels) in enumerate(zip(boxes, labels, strict=True)):
        padded.boxes[image, : len(some_boxes)] = some_boxes
        padded.labels[image, : len(some_labels)] = some_labels
    return padded
