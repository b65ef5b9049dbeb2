"""A look at what a detector finds."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils import images
from utils.engine import TrainState
from utils.labels import LabelIndex
from utils.metrics import MetricsWriter
from utils.pictures import grid

IMAGES, SIDE = 4, 320  # how many; longer side of one in pixels
TRUTH, DETECTION = (0, 114, 178), (230, 159, 0)  # Okabe and Ito's blue and orange: told apart by all eyes
LETTERS = 24  # of a class's name
ABOUT = "Blue: objects. Orange: as many detections, those with the highest scores."


def show(writer: MetricsWriter, state: TrainState, index: LabelIndex, detections: np.ndarray) -> None:
    """Give TensorBoard the picture of this epoch."""
    writer.events.picture("detections", over_truth(index, detections), ABOUT, state.step)


def over_truth(index: LabelIndex, detections: np.ndarray) -> Image.Image:
    """Boxes of a few images of a split, always the same ones, and over them as many of the best `detections`.

    Args:
        detections: (n, 7), rows of `utils.coco.COLUMNS`.
    """
    count = len(index)
    chosen = np.unique(np.linspace(0, count - 1, min(IMAGES, count)).round().astype(int))
    return grid([_picture(index, image, detections) for image in chosen.tolist()], columns=2)


def _picture(index: LabelIndex, image: int, detections: np.ndarray) -> Image.Image:
    original = images.decode(index.read(image), index.shown(image))
    picture = ImageOps.contain(original, (SIDE, SIDE))  # small ones larger: names have room
    scale = np.tile(np.divide(picture.size, original.size), 2)
    truth = index.boxes[slice(*index.offsets[image : image + 2])]
    own = detections[detections[:, 0] == index.ids[image]]
    best = own[np.argsort(-own[:, 5], kind="stable")][: len(truth)]
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(10)
    for box in truth * scale:
        draw.rectangle(box.tolist(), outline=TRUTH, width=2)
    for row in best:
        x1, y1, x2, y2 = (row[1:5] * scale).tolist()
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=DETECTION, width=2)
        name = f"{index.classes[int(row[6]) - 1][:LETTERS]} {row[5]:.2f}"
        at, anchor = ((x2 - 3, y1 + 2), "ra") if x1 > 0.65 * picture.width else ((x1 + 3, y1 + 2), "la")
        draw.text(at, name, DETECTION, font, anchor, stroke_width=1, stroke_fill="black")
    return picture
