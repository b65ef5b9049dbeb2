"""Validation of the U-Net's proposals, and not after every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from detect_train import pictures
from detect_train.geometry import iou
from detect_train.validation import PART, predicted
from utils import dist, timeline
from utils.engine import TrainState
from utils.hooks import Hook
from utils.labels import LabelIndex
from utils.metrics import MetricsWriter
from utils.saving import SaveCheckpoints

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
    """Writes which share of the validation split's objects, and of those of each class, the proposals find."""

    def __init__(self, index: LabelIndex, writer: MetricsWriter, save: SaveCheckpoints, **how: Any) -> None:
        """Args: how: `predict`'s batch_size, workers, device and precision."""
        self.index, self.writer, self.save, self.how = index, writer, save, how

    def before_end(self, state: TrainState) -> None:
        proposals = predicted(state, self.index, self.save, **self.how)
        found = recalled(self.index, proposals)
        recall = float(found.mean())
        state.summary["recall"] = recall
        if dist.rank() == 0:
            of_class = {name: found[self.index.labels == 1 + i] for i, name in enumerate(self.index.classes)}
            shares = {name: float(objects.mean()) for name, objects in of_class.items() if len(objects)}
            self.writer.write("val", epoch=state.epoch, step=state.step, recall=recall, recall_per_class=shares)
            pictures.show(self.writer, state, self.index, proposals)
            loss, classes = state.summary["loss_avg"], ", ".join(f"{name} {each:.3f}" for name, each in shares.items())
            line = f"Epoch Stats [{state.epoch}] - Loss Avg: {loss:.6f}, Proposal Recall: {recall:.6f} ({classes})"
            print(line, flush=True)
        timeline.done(PART)


def recalled(index: LabelIndex, proposals: np.ndarray) -> np.ndarray:
    """(M,) bool: which of the boxes of `index` a proposal of their image overlaps enough.

    Args:
        proposals: (n, 7), rows as `predict` gives them, by image id.
    """
    limits = np.searchsorted(proposals[:, 0], index.ids, "left"), np.searchsorted(proposals[:, 0], index.ids, "right")
    found = np.zeros(len(index.boxes), dtype=bool)
    for image, (first, last) in enumerate(zip(*limits, strict=True)):
        objects = slice(*index.offsets[image : image + 2])
        overlap = iou(torch.from_numpy(index.boxes[objects]), torch.from_numpy(proposals[first:last, 1:5].copy()))
        found[objects] = (overlap >= OVERLAP).any(dim=1).numpy()
    return found
