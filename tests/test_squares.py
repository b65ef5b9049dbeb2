"""Pictures in squares of one size, and regions of squares as detections of the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from detect_train.regions import Regions, Rules, detections
from detect_train.squares import FILL, Squares, collate, fitted, most_boxes, stack
from tests.labeled_set import COLOURS, write_example
from utils import labels
from utils.labels import LabelIndex
from utils.loader import Seeded
from utils.tree import Folder

RULES = Rules(score_threshold=0.1, overlap=0.5, most=3)
BOXES = [[4, 6, 20, 30], [40, 10, 60, 44]]


@pytest.fixture
def index(tmp_path: Path) -> LabelIndex:
    """A picture of 64 x 48 with a cat and a dog, and one with nothing."""
    write_example(tmp_path / "training", 1, BOXES, ["cat", "dog"])
    write_example(tmp_path / "training", 2, [], [])
    return labels.load(Folder(tmp_path), "training", classes=None, on_error="error", cache=tmp_path / "cache.index")


@pytest.mark.parametrize("side", [32, 64, 160])
def test_boxes_stay_on_their_objects_whatever_the_side(index: LabelIndex, side: int) -> None:
    image, target = Squares(index, side, flip=False)[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, side, side))
    assert (target["size"], target["image_id"], target["labels"].tolist()) == ((48, 64), 1, [1, 2])
    scale = side / 64
    assert torch.allclose(target["boxes"], torch.tensor(BOXES) * scale)
    for box, name in zip(target["boxes"].int().tolist(), ("cat", "dog"), strict=True):
        inside = image[:, box[1] + 3 : box[3] - 3, box[0] + 3 : box[2] - 3].float().mean(dim=(1, 2))
        assert torch.allclose(inside, torch.tensor(COLOURS[name]).float(), atol=12)
    assert (image[:, int(48 * scale) :] == FILL).all() and not (image[:, : int(48 * scale)] == FILL).all()


def test_the_picture_is_mirrored_and_not_the_square(index: LabelIndex) -> None:
    flipping = Seeded(Squares(index, 96, flip=True), 0)
    lefts = set()
    for epoch in range(20):
        image, target = flipping[(epoch, 0)]
        lefts.add(target["boxes"][0, 0].item())
        assert (image[:, 72:] == FILL).all() and not (image[:, :72] == FILL).all(dim=0).any(dim=0).all()
        again, _ = flipping[(epoch, 0)]
        assert torch.equal(again, image)
    assert lefts == {6, 66}


def test_a_picture_keeps_its_aspect_and_at_least_a_pixel() -> None:
    assert fitted((48, 64), 128) == (96, 128) and fitted((375, 500), 128) == (96, 128)
    assert fitted((3, 1000), 128) == (1, 128)


def test_shapes_of_a_batch_do_not_depend_on_what_is_in_it(index: LabelIndex) -> None:
    squares = Squares(index, 64, flip=False)
    most = most_boxes(index)
    assert most == 2
    for some in ([0, 1], [1, 1]):
        batch = collate([squares[i] for i in some], most)
        assert batch.images.shape == (2, 3, 64, 64) and batch.targets.boxes.shape == (2, 2, 4)  # type: ignore[union-attr]
        assert batch.targets.counts.tolist() == [2 * (i == 0) for i in some]
    filled = stack([squares[0]], 3)
    assert filled.shape == (3, 3, 64, 64) and torch.equal(filled[0], squares[0][0])


def test_regions_become_the_pictures_own_detections() -> None:
    boxes = torch.tensor([
        [10.0, 10, 30, 30], [11, 10, 31, 30], [11, 10, 31, 30], [-5, 80, 20, 140], [40, 110, 60, 120], [0, 0, 9, 9],
        [60, 60, 90, 90], [64, 0, 90, 30],
    ])  # fmt: skip
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.95, 0.05, 0.0, 0.3])
    classes = torch.tensor([1, 1, 2, 1, 1, 1, 1, 1])
    order = torch.tensor([3, 7, 5, 0, 2, 6, 1, 4])
    regions = Regions(*(torch.stack([part[order]] * 2) for part in (boxes, scores, classes)))
    (found,) = detections(regions, [(200, 256)], 128, RULES)
    # a picture of 100 x 128 in the square: the fifth is beside it, the fourth is cut, the second is the first's again
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert found["labels"].tolist() == [1, 2, 1]
    assert found["boxes"].tolist() == [[20, 20, 60, 60], [22, 20, 62, 60], [0, 160, 40, 200]]


def test_no_region_is_no_detection() -> None:
    regions = Regions(torch.zeros(1, 4, 4), torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.int64))
    (found,) = detections(regions, [(64, 64)], 64, Rules(0.0, 0.5, 10))
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
    }


def test_scaling_there_and_back_is_nothing() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        height, width = random.integers(20, 300, 2).tolist()
        rows, columns = fitted((height, width), 96)
        box = torch.tensor([[0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height]])
        ratios = torch.tensor([columns / width, rows / height] * 2)
        regions = Regions((box * ratios)[None], torch.tensor([[0.5]]), torch.tensor([[1]]))
        (found,) = detections(regions, [(height, width)], 96, RULES)
        torch.testing.assert_close(found["boxes"], box)
