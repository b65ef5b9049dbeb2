"""A look at what pretraining sees."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ssl_train.batches import ShuffledBatches
from ssl_train.data import Share, Views, to_device
from utils import dist, timeline
from utils.engine import TrainState
from utils.hooks import Hook
from utils.images import MEAN, STD
from utils.metrics import MetricsWriter
from utils.pictures import grid

IMAGES, SIDE = 8, 112  # of how many images; of a view in pixels, at most
ABOUT = "The two views of an image stand one above the other; images of the epoch's first batch."


class ShowViews(Hook):
    """Before each epoch, both views of a few of its images for TensorBoard: rank 0 makes them once more."""

    def __init__(self, views: Views, batches: ShuffledBatches, writer: MetricsWriter) -> None:
        self.views, self.batches, self.writer = views, batches, writer

    def before_epoch(self, state: TrainState) -> None:
        first = state.step - state.batch + 1
        if dist.rank() == 0 and self.writer.step < first:  # else the epoch goes on, and its picture counts
            chosen = np.array(self.batches.indices(state.epoch, 0)[:IMAGES])
            self.writer.events.picture("views", pairs(self.views, state.epoch, chosen), ABOUT, first)
            timeline.done("compute")


def pairs(views: Views, epoch: int, images: np.ndarray) -> Image.Image:
    """The query views of `images` (n,) in an epoch, and below them their key views."""
    batch = views.__getitems__(Share(epoch, images, images, np.arange(len(images))))
    both = torch.cat(to_device(batch, torch.device("cpu"))).permute(0, 2, 3, 1)
    levels = (both * torch.tensor(STD) + torch.tensor(MEAN)).mul(255).round().clamp(0, 255).to(torch.uint8)
    pictures = [Image.fromarray(view) for view in levels.numpy()]
    for picture in pictures:
        picture.thumbnail((SIDE, SIDE))
    return grid(pictures, columns=len(images))
