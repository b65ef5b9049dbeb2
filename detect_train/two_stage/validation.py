"""Validation of the U-Net's proposals, and not after every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from detect_train.geometry import iou
from detect_train.validation import predicted
from utils import dist
from utils.engine import TrainState
from utils.hooks import Hook, SaveCheckpoints
from utils.labels import LabelIndex
from utils.metrics import MetricsWriter

OVERLAP = 0.5  # IoU from which on a proposal has found an object


class Seldom(Hook):
    """A validation `hook` after every `every` epochs and after the last; between them no epoch is the best."""

    def __init__(self, hook: Hook, every: int, epochs: int) -> None:
        self.hook, self.every, self.epochs = hook, every, epochs

    def before_end(self, state: TrainState) -> None:
        state.is_best = False
        if (state.epoch + 1) % self.every == 0 or state.epoch + 1 == self.epochs:
            self.hook.before_end(state)


class Recall(Hook):
    """Writes which share of the validation split's objects the proposals find, whatever their class."""

    def __init__(self, index: LabelIndex, writer: MetricsWriter, save: SaveCheckpoints, **how: Any) -> None:
        """Args: how: `predict`'s batch_size, workers, device and precision."""
        self.index, self.writer, self.save, self.how = index, writer, save, how

    def before_end(self, state: TrainState) -> None:
        proposals = predicted(state, self.index, self.save, **self.how)
        state.summary["recall"] = recall(self.index, proposals)
        if dist.rank() == 0:
            value = state.summary["recall"]
            self.writer.write("val", epoch=state.epoch, step=state.step, recall=value)
            loss = state.summary["loss_avg"]
            print(f"Epoch Stats [{state.epoch}] - Loss Avg: {loss:.6f}, Proposal Recall: {value:.6f}", flush=True)


def recall(index: LabelIndex, proposals: np.ndarray) -> float:
    """The share of all boxes of `index` that a proposal of their image, rows as `predict` gives them, overlaps enough.

    Args:
        proposals: (n, 7), by image id.
    """
    limits = np.searchsorted(proposals[:, 0], index.ids, "left"), np.searchsorted(proposals[:, 0], index.ids, "right")
    found = 0
    for image, (first, last) in enumerate(zip(*limits, strict=True)):
        boxes, _ = index.target(image)
        if last > first and len(boxes):
            overlap = iou(torch.from_numpy(boxes), torch.from_numpy(proposals[first:last, 1:5].copy()))
            found += int((overlap.amax(dim=1) >= OVERLAP).sum())
    return found / len(index.boxes)
