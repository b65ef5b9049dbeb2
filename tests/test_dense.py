"""The dense detector's arithmetic against slow versions of the paper's, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from detect_train import reading
from detect_train.dense import DenseDetector
from detect_train.dense_loss import OBJECT, Predictions, focal, giou, losses
from detect_train.dense_targets import Places, assign, centerness, places
from detect_train.inference import measure, predict
from detect_train.model import build
from detect_train.pyramid import CHANNELS
from detect_train.targets import Targets, pad
from utils import labels
from utils.optim import sgd
from utils.sample_data import Sample, draw_labeled
from utils.tree import Folder

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "head": "dense", "num_classes": 4, "backbone": "resnet18", "trainable_layers": 5, "norm": "train", "max_size": 64,
    "anchor_sizes": [8, 16, 32, 64, 128], "proposals_test": 30, "score_threshold": 0.0, "detections_per_image": 10,
}  # fmt: skip
GRIDS, STRIDES, RANGES = (8, 4, 2, 1, 1), (8, 16, 32, 64, 128), (0, 16, 32, 64, 128, math.inf)


def small(**changes: Any) -> DenseDetector:
    torch.manual_seed(0)
    model: DenseDetector = build(**{**SMALL, **changes})
    return model


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def target(*boxes: list[float]) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": 1 + torch.arange(len(boxes)) % 3}


def crowd(seed: int, objects: int) -> dict[str, torch.Tensor]:
    """Boxes of all sizes, many of them inside others."""
    corners = np.random.default_rng(seed).uniform(0, 64, (objects, 2, 2))
    x1, y1 = corners.min(axis=1).T
    x2, y2 = corners.max(axis=1).T + 1
    return target(*np.stack([x1, y1, x2, y2], axis=1).tolist())


def slow_goals(boxes: np.ndarray, names: np.ndarray) -> tuple[list[int], list[list[float]], list[float]]:
    """Section 3 of the paper, place by place and object by object, with centre sampling."""
    said, sides, centres = [], [], []
    for level, (grid, stride) in enumerate(zip(GRIDS, STRIDES, strict=True)):
        for row in range(grid):
            for column in range(grid):
                x, y = stride // 2 + column * stride, stride // 2 + row * stride
                best: tuple[float, int, list[float]] | None = None
                for (x1, y1, x2, y2), name in zip(boxes, names, strict=True):
                    middle_x, middle_y, reach = (x1 + x2) / 2, (y1 + y2) / 2, 1.5 * stride
                    inner = max(x1, middle_x - reach), max(y1, middle_y - reach)
                    outer = min(x2, middle_x + reach), min(y2, middle_y + reach)
                    if not (inner[0] < x < outer[0] and inner[1] < y < outer[1]):
                        continue
                    ltrb = [x - x1, y - y1, x2 - x, y2 - y]
                    area = (x2 - x1) * (y2 - y1)
                    if RANGES[level] <= max(ltrb) <= RANGES[level + 1] and (best is None or area < best[0]):
                        best = area, int(name), ltrb
                said.append(best[1] if best else 0)
                sides.append(best[2] if best else [1.0] * 4)
                left, top, right, bottom = sides[-1]
                across, down = min(left, right) / max(left, right), min(top, bottom) / max(top, bottom)
                centres.append(math.sqrt(across * down))
    return said, sides, centres


def all_places() -> Places:
    return places(GRIDS, STRIDES, SMALL["anchor_sizes"])


@pytest.mark.parametrize("seed", range(5))
def test_goals_are_the_paper_s(seed: int) -> None:
    images = [crowd(seed, 8), target(), crowd(100 + seed, 3)]
    found = assign(pad(images), all_places())
    assert (found.labels[0] > 0).any()
    for i, image in enumerate(images):
        said, sides, centres = slow_goals(image["boxes"].numpy(), image["labels"].numpy())
        assert found.labels[i].tolist() == said
        np.testing.assert_allclose(found.distances[i], sides, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.centerness[i], centres, rtol=1e-4, atol=1e-5)


def test_losses_are_the_paper_s() -> None:
    goals = assign(pad([crowd(0, 40), crowd(1, 2)]), all_places())
    random = torch.Generator().manual_seed(0)
    shape = goals.labels.shape
    said = Predictions(
        torch.randn(*shape, 3, generator=random),
        torch.rand(*shape, 4, generator=random) * 20 + 1,
        torch.randn(shape, generator=random),
    )
    found = losses(said, goals)
    positive = goals.labels > 0
    count = int(positive.sum())
    assert count > OBJECT * 2
    wanted = torch.nn.functional.one_hot(goals.labels, 4)[..., 1:].float()
    expected = sigmoid_focal_loss(said.classes, wanted, reduction="sum") / count
    torch.testing.assert_close(found["loss_classifier"], expected)
    signs = torch.tensor([-1, -1, 1, 1])
    boxes = [100 + signs * distances[positive] for distances in (said.distances, goals.distances)]
    overlap = generalized_box_iou(*boxes).diagonal()
    torch.testing.assert_close(found["loss_box_reg"], (1 - overlap).mean())
    chance, goal = said.centerness[positive].sigmoid(), goals.centerness[positive]
    entropy = -(goal * chance.log() + (1 - goal) * (1 - chance).log())
    torch.testing.assert_close(found["loss_centerness"], entropy.mean())


def test_losses_stay_finite_at_the_ends() -> None:
    ends = torch.tensor([-1e4, 0.0, 1e4])
    assert focal(ends, torch.tensor([1.0, 0.0, 0.0])).isfinite().all()
    assert giou(torch.full((4,), 1e-6), torch.full((4,), 1e3)) == pytest.approx(-0, abs=1e-6)
    assert centerness(torch.tensor([1e-6, 1.0, 1e3, 1.0])).isfinite()


def test_padding_has_no_influence() -> None:
    model, images = small(norm="frozen").train(), [target([4, 4, 40, 40], [8, 8, 60, 30]), target()]
    found = []
    for rows in (1, 2, 9):
        targets = pad(images, rows)
        assert targets.boxes.shape[1] == max(rows, 2)
        absent = ~targets.present()[..., None]
        rubbish = targets._replace(boxes=torch.where(absent, torch.tensor([0.0, 0, 50, 50]), targets.boxes))
        model.zero_grad()
        losses: Any = model(pictures(), rubbish)
        sum(losses.values()).backward()
        gradient: Any = model.head.sides.weight.grad
        found.append([float(loss.detach()) for loss in losses.values()] + [float(gradient.sum())])
    assert found[0] == found[1] == found[2]


def test_a_batch_without_boxes_teaches_background_and_no_more_than_another() -> None:
    model = small().train()

    def step(*images: dict[str, torch.Tensor]) -> tuple[dict[str, float], float]:
        model.zero_grad()
        losses: Any = model(pictures(), pad(images, 4))
        sum(losses.values()).backward()
        squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
        return {name: float(loss.detach()) for name, loss in losses.items()}, float(torch.stack(squares).sum().sqrt())

    found, size = step(target(), target())
    assert found["loss_classifier"] > 0 == found["loss_box_reg"] == found["loss_centerness"]
    assert 0 < size < step(target([4, 4, 40, 40]), target([8, 8, 60, 30]))[1]


def test_every_weight_that_is_trained_gets_a_gradient() -> None:
    for norm, layers in (("train", 5), ("frozen", 2)):
        model = small(norm=norm, trainable_layers=layers).train()
        losses: Any = model(pictures(), pad([target(), target()]))
        sum(losses.values()).backward()
        assert [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None] == []
        trained = {
            name.split(".")[2] for name, each in model.backbone.named_parameters("backbone") if each.requires_grad
        }
        assert ("layer1" in trained) == (layers == 5)


def test_the_best_pairs_are_those_of_sorting_all() -> None:
    model = small().eval()
    every, classes = len(model.points), 3
    random = torch.Generator().manual_seed(0)
    said = Predictions(
        3 * torch.randn(2, every, classes, generator=random),
        torch.rand(2, every, 4, generator=random) * 20 + 1,
        torch.randn(2, every, generator=random),
    )
    found = model.best(said)
    assert [tuple(part.shape) for part in found] == [(2, 30, 4), (2, 30), (2, 30)]
    for i in range(2):
        scores = (said.classes[i].sigmoid() * said.centerness[i].sigmoid()[:, None]).sqrt().numpy()
        order = np.argsort(-scores, axis=None)[:30]
        np.testing.assert_allclose(found.scores[i], scores.reshape(-1)[order], rtol=1e-5)
        assert found.labels[i].tolist() == (order % classes + 1).tolist()
        for box, place in zip(found.boxes[i], order // classes, strict=True):
            left, top, right, bottom = said.distances[i, place]
            x, y = model.points[place]
            torch.testing.assert_close(box, torch.stack([x - left, y - top, x + right, y + bottom]))


def test_there_are_never_more_regions_than_places() -> None:
    regions = small(proposals_test=1000).eval()(pictures())
    assert regions.boxes.shape == (2, 64 + 16 + 4 + 1 + 1, 4)


def test_geometry_is_float32_under_bf16_autocast() -> None:
    model = small(norm="frozen").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        regions = model(pictures())
        losses = model.train()(pictures(), pad([target([4, 4, 40, 40]), target()]))
    assert regions.boxes.dtype == regions.scores.dtype == torch.float32
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_a_few_pictures_are_learnt_by_heart(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "training" / kind).mkdir(parents=True)
    for number in range(6):
        draw_labeled(tmp_path, Sample(size=64), "training", number)
    index = labels.load(Folder(tmp_path), "training", classes=None, on_error="error", cache=tmp_path / "cache.index")
    model = small(num_classes=1 + len(index.classes), score_threshold=0.05, proposals_test=86).train()
    reader = reading.of(model)
    examples = reader.examples(index, flip=False)
    images, targets = reader.collate(index)([examples[i] for i in range(6)])
    assert isinstance(images, torch.Tensor) and isinstance(targets, Targets)
    optimizer = sgd(model, lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(40):
        losses: Any = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    found = predict(model, examples, batch_size=4, workers=0, device=CPU, precision="float32")
    assert measure(index, found, CPU)[0]["AP50"] > 0.5


def test_sides_are_as_fine_in_bf16_as_in_float32() -> None:
    head = small().head
    levels = [torch.rand(1, CHANNELS, side, side) for side in GRIDS]
    with torch.autocast("cpu", torch.bfloat16):
        classes, sides, _ = head(levels)
    assert torch.equal(classes, classes.bfloat16().float())  # it is bf16 that the rest is computed in
    assert not torch.equal(sides, sides.bfloat16().float())
