"""Validation after each epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from detect_train import pictures, reading
from detect_train.inference import measure, predict
from utils import dist, timeline
from utils.engine import TrainState
from utils.errors import Stopped
from utils.hooks import Hook
from utils.labels import LabelIndex
from utils.metrics import MetricsWriter
from utils.saving import SaveCheckpoints

PART = "validation"  # of a stage's time


class Validate(Hook):
    """Writes COCO's numbers of the validation split and says whether this epoch's AP is the best so far.

    Stands between LogMetrics, whose losses it prints, and SaveCheckpoints, which keeps the best.
    """

    def __init__(
        self,
        index: LabelIndex,
        writer: MetricsWriter,
        save: SaveCheckpoints,
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
        precision: str,
    ) -> None:
        self.index, self.writer, self.save, self.device = index, writer, save, device
        self.how: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "device": device,
            "precision": precision,
        }

    def before_end(self, state: TrainState) -> None:
        detections = predicted(state, self.index, self.save, **self.how)
        stats, _ = measure(self.index, detections, self.device)
        state.is_best = state.best is None or stats["AP"] > state.best
        if state.is_best:
            state.best = stats["AP"]
        state.summary |= stats
        if dist.rank() == 0:
            self.writer.write("val", epoch=state.epoch, step=state.step, best=state.is_best, **stats)
            pictures.show(self.writer, state, self.index, detections)
            print(
                f"Epoch Stats [{state.epoch}] - Loss Avg: {state.summary['loss_avg']:.6f}, "
                f"Loss Median: {state.summary['loss_median']:.6f}, "
                f"Validation AP: {stats['AP']:.6f}, Is Best: {state.is_best}",
                flush=True,
            )
        timeline.done(PART)


def predicted(state: TrainState, index: LabelIndex, save: SaveCheckpoints, **how: Any) -> np.ndarray:
    """`predict` with the model as it is, saved first when a signal asks for the end. Args: how: `predict`'s."""
    # Each rank's BatchNorm has seen its own images; what is measured, and saved, is rank 0's.
    for buffer in state.model.buffers():
        dist.broadcast(buffer)
    images, before = reading.of(state.model).examples(index, flip=False), timeline.spent(PART)
    try:
        return predict(state.model, images, part=PART, **how)
    except Stopped:
        timeline.done(PART)
        save.now(state)  # the epoch's steps; the validation is done again
        timeline.is_done_again(PART, timeline.spent(PART) - before)
        raise
