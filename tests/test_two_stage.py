"""The two-stage detector's arithmetic against slow versions of it, and that no number of objects changes a shape."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou

from detect_train.model import build, from_checkpoint
from detect_train.targets import Targets, pad
from detect_train.two_stage.classifier import CONTEXT, FAR, OVERLAP, Noise, Sample, choose, jittered, losses
from detect_train.two_stage.config import Iterations
from detect_train.two_stage.crops import crop, enlarge
from detect_train.two_stage.maps import NARROWEST, SPREAD, STRIDE, UNIT, Maps, goals
from detect_train.two_stage.maps import losses as map_losses
from detect_train.two_stage.model import TwoStage, best_pairs
from detect_train.two_stage.parts import Until, schedule
from detect_train.two_stage.unet import UNet
from detect_train.two_stage.validation import recalled
from utils.engine import TrainState
from utils.labels import LabelIndex
from utils.tree import Folder

SMALL: dict[str, Any] = {
    "head": "two_stage", "num_classes": 3, "backbone": "resnet18", "side": 64, "width": 4, "proposals": 8,
    "crop_side": 32, "samples": 6, "score_threshold": 0.0, "overlap": 0.5, "detections_per_image": 10,
}  # fmt: skip


def small() -> TwoStage:
    torch.manual_seed(0)
    model: TwoStage = build(**SMALL)
    return model


def some(*images: list[list[float]], rows: int = 4) -> Targets:
    """Padded targets of images given by their boxes; labels 1, 2, 1, 2, ..."""
    return pad(
        [{"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": 1 + torch.arange(len(boxes)) % 2} for boxes in images],
        rows,
    )


def pictures(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


BOXES = [[4.0, 6.0, 20.0, 30.0], [18.0, 6.0, 40.0, 28.0], [50.0, 50.0, 52.0, 51.5]]


def test_the_goals_are_those_drawn_place_by_place() -> None:
    places = 16
    wanted = goals(some(BOXES, []), places)
    heat = np.zeros((len(BOXES), places, places))
    mask, peak = np.zeros((places, places)), np.zeros((places, places), dtype=bool)
    for k, (x1, y1, x2, y2) in enumerate(np.array(BOXES) / STRIDE):
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        for row in range(places):
            for column in range(places):
                x, y = column + 0.5, row + 0.5
                sx, sy = max(SPREAD * (x2 - x1), NARROWEST), max(SPREAD * (y2 - y1), NARROWEST)
                heat[k, row, column] = math.exp(-0.5 * (((x - cx) / sx) ** 2 + ((y - cy) / sy) ** 2))
                mask[row, column] += x1 <= x < x2 and y1 <= y < y2
        peak[int(cy), int(cx)] = mask[int(cy), int(cx)] = heat[k, int(cy), int(cx)] = 1
    owner = heat.argmax(0)
    sides = [(math.log((x2 - x1) / (64 * UNIT)), math.log((y2 - y1) / (64 * UNIT))) for x1, y1, x2, y2 in BOXES]
    share = heat / np.maximum(heat.sum((1, 2), keepdims=True), 1)
    np.testing.assert_allclose(wanted.centre[0], heat.max(0), atol=1e-6)
    np.testing.assert_array_equal(wanted.mask[0], mask > 0)
    np.testing.assert_array_equal(wanted.peak[0], peak)
    counts = wanted.weight[0] > 1e-6
    slow = np.moveaxis(np.array(sides)[owner], -1, 0)
    np.testing.assert_allclose(wanted.extents[0, :, counts], slow[:, counts], atol=1e-6)
    np.testing.assert_allclose(wanted.weight[0], np.take_along_axis(share, owner[None], 0)[0], atol=1e-6)
    for part in (wanted.mask, wanted.centre, wanted.peak, wanted.weight):
        assert not part[1].any(), "an image without objects"


def test_the_losses_are_the_papers() -> None:
    targets = some(BOXES, [[0.0, 0.0, 64.0, 64.0]])
    wanted = goals(targets, 16)
    random = np.random.default_rng(0).normal(size=(4, 2, 16, 16))
    tensors = [torch.from_numpy(part) for part in random]
    found = map_losses(Maps(tensors[0], tensors[1], torch.stack(tensors[2:], dim=1)), wanted, targets)
    mask, centre, extents = random[0], 1 / (1 + np.exp(-random[1])), np.moveaxis(random[2:], 0, 1)
    y = wanted.centre.numpy().astype(float)
    focal = np.where(wanted.peak, (1 - centre) ** 2 * np.log(centre), (1 - y) ** 4 * centre**2 * np.log(1 - centre))
    entropy = np.where(wanted.mask > 0, np.log1p(np.exp(-mask)), np.log1p(np.exp(mask)))
    far = (np.abs(extents - wanted.extents.numpy()).sum(1) * wanted.weight.numpy()).sum()
    assert float(found["loss_mask"]) == pytest.approx(entropy.mean(), rel=1e-6)
    assert float(found["loss_centre"]) == pytest.approx(-focal.sum() / 4, rel=1e-6)
    assert float(found["loss_extents"]) == pytest.approx(far / 4, rel=1e-6)


def test_maps_that_say_it_all_are_proposed_as_they_are() -> None:
    wanted = goals(some(BOXES), 16)
    model = UNet(backbone="resnet18", side=64, width=4, proposals=8)
    boxes, scores = model.propose(Maps(20 * wanted.mask - 10, 20 * wanted.centre - 15, wanted.extents))
    middles = (boxes[0, :3, :2] + boxes[0, :3, 2:]) / 2
    for box in torch.tensor(BOXES):
        near = (middles - (box[:2] + box[2:]) / 2).abs().amax(dim=1)
        assert near.min() <= STRIDE / 2
        sides = boxes[0, near.argmin(), 2:] - boxes[0, near.argmin(), :2]
        torch.testing.assert_close(sides, (box[2:] - box[:2]).clamp(min=2))
    assert (scores[0, :3] > 0.9).all() and (scores[0, 3:] < 0.01).all()


def test_a_crop_of_the_whole_image_is_the_image_resized() -> None:
    images = torch.rand(2, 3, 40, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for side in (16, 40, 96):
        whole = torch.tensor([0.0, 0.0, 56.0, 40.0]).expand(2, 1, 4).double()
        resized = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        torch.testing.assert_close(crop(images, whole, side), resized)


def test_a_crop_is_what_a_slow_triangle_gives() -> None:
    image = np.random.default_rng(0).random((30, 30))
    box, side = (3.3, -4.0, 25.1, 12.7), 5

    def weight(pixel: int, start: float, end: float, sample: int) -> float:
        step = (end - start) / side
        at = min(max(start + step * (sample + 0.5), 0.5), 29.5)
        return max(0.0, 1 - abs(pixel + 0.5 - at) / max(step, 1))

    slow = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            rows = np.array([weight(pixel, box[1], box[3], i) for pixel in range(30)])
            columns = np.array([weight(pixel, box[0], box[2], j) for pixel in range(30)])
            slow[i, j] = (rows / rows.sum()) @ image @ (columns / columns.sum())
    fast = crop(torch.from_numpy(image)[None, None], torch.tensor([[box]], dtype=torch.float64), side)
    np.testing.assert_allclose(fast[0, 0], slow, atol=1e-6)


def test_every_crop_is_of_its_own_image_and_channel() -> None:
    images = torch.arange(12.0).reshape(2, 6, 1, 1).expand(-1, -1, 20, 20)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [3.0, 4.0, 3.0, 4.0], [-5.0, 2.0, 30.0, 3.0]]).expand(2, 3, 4)
    expected = torch.arange(12.0).reshape(2, 1, 6, 1, 1).expand(2, 3, 6, 4, 4).flatten(0, 1)
    torch.testing.assert_close(crop(images, boxes, 4), expected)


def test_boxes_are_enlarged_around_their_centres() -> None:
    assert enlarge(torch.tensor([10.0, 20.0, 30.0, 24.0]), 1.5).tolist() == [5, 19, 35, 25]
    assert CONTEXT > 1


@pytest.mark.parametrize("objects", [[], BOXES[:1], BOXES])
def test_as_many_regions_whatever_is_in_the_image(objects: list[list[float]]) -> None:
    model = small().eval()
    images = pictures()
    found = model(images if objects else torch.zeros_like(images))
    assert [tuple(part.shape) for part in found] == [(2, 8, 4), (2, 8), (2, 8)]
    assert ((found.scores >= 0) & (found.scores <= 1)).all() and ((found.labels >= 1) & (found.labels <= 2)).all()
    targets = some(objects, [])
    parts = model.train()(images, targets, Noise.draw(targets, 8, 0))
    assert set(parts) == {"loss_class", "loss_box"} and all(value.isfinite() for value in parts.values())
    parts = model.unet.train()(images, targets)
    assert all(value.isfinite() for value in parts.values())


def sampled(size: int, targets: Targets, proposals: torch.Tensor) -> Sample:
    return choose(proposals, targets, Noise.draw(targets, proposals.shape[1], 0), size)


def test_half_of_a_sample_stands_for_objects() -> None:
    targets = some(BOXES[:2])
    near = torch.tensor([BOXES[0], BOXES[1], BOXES[0], BOXES[1]])
    far = torch.tensor([[40.0, 40.0, 60.0, 60.0]]).expand(6, 4)
    sample = sampled(6, targets, torch.cat([near, far])[None])
    assert sample.taken.all() and sample.labels[0, 3:].tolist() == [0, 0, 0]
    for box, label, goal in zip(sample.boxes[0, :3], sample.labels[0, :3], sample.wanted[0, :3], strict=True):
        assert goal.tolist() == BOXES[int(label) - 1] and (box - goal).abs().max() < 8
    torch.testing.assert_close(sample.boxes[0, 3:], far[:3])


def test_a_sample_fills_up_with_what_there_is() -> None:
    only_far = sampled(6, some([]), torch.tensor([[40.0, 40.0, 60.0, 60.0]]).expand(1, 6, 4))
    assert only_far.taken.all() and not only_far.labels.any()
    only_near = sampled(6, some(BOXES[:1]), torch.tensor(BOXES[:1]).expand(1, 6, 4))
    assert only_near.taken.all() and (only_near.labels == 1).all()


def test_an_object_that_is_not_proposed_is_learnt_all_the_same() -> None:
    found = sampled(4, some(BOXES[:1]), torch.tensor([[40.0, 40.0, 60.0, 60.0]]).expand(1, 8, 4))
    assert found.labels[0].tolist() == [1, 0, 0, 0]


def test_a_rare_class_is_drawn_as_often_as_a_common_one() -> None:
    targets = some([[8.0 * i, 0.0, 8.0 * i + 7, 30.0] for i in range(8)], rows=8)
    targets.labels[0] = torch.tensor([1, 1, 1, 1, 1, 1, 1, 2])
    none = torch.zeros(1, 1, 4)
    drawn = [int(choose(none, targets, Noise.draw(targets, 1, seed), 2).labels[0, 0]) for seed in range(400)]
    assert 160 < drawn.count(2) < 240  # 50 if every object were as likely; four standard deviations


def test_what_overlaps_an_object_by_half_or_little_less_is_not_learnt_as_background() -> None:
    box = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
    near, far = box + torch.tensor([7.5, 0.0, 7.5, 0.0]), box + torch.tensor([12.0, 0.0, 12.0, 0.0])
    assert FAR < box_iou(box, near) < OVERLAP and box_iou(box, far) < FAR
    sample = sampled(6, some(box.tolist()), torch.cat([near, near, near, far])[None])
    assert sorted(sample.labels[sample.taken].tolist()) == [0, 1]


def test_jitter_is_bounded_by_the_match() -> None:
    corners = torch.tensor([[a, b, c, d] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1) for d in (-1, 1)])
    boxes = torch.tensor([[10.0, 10.0, 30.0, 50.0]]).expand(16, 4)
    overlap = box_iou(boxes[:1], jittered(boxes, corners.float()))
    assert overlap.min() > FAR and overlap.max() < 1


def test_filled_up_rows_count_nothing() -> None:
    targets = some(BOXES[:1], rows=9)
    sample = choose(torch.zeros(1, 0, 4), targets, Noise.draw(targets, 0, 0), 6)
    assert sample.taken[0].tolist() == [True] + [False] * 5
    scores, offsets = torch.randn(1, 6, 3), torch.randn(1, 6, 4)
    first = losses(scores, offsets, sample)
    scores[0, 1:], offsets[0, 1:] = 7, 7
    assert losses(scores, offsets, sample) == first and all(value.isfinite() for value in first.values())


def test_pairs_of_box_and_class_are_ranked_together() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 3.0, 3.0], [4.0, 4.0, 5.0, 5.0]]])
    shares = torch.tensor([[[0.1, 0.5, 0.4], [0.9, 0.1, 0.0], [0.2, 0.1, 0.7]]])
    found = best_pairs(boxes, torch.tensor([[0.5, 0.9, 1.0]]), shares.log())
    assert found.labels.tolist() == [[2, 1, 2]]
    torch.testing.assert_close(found.scores, torch.tensor([[0.7, 0.25, 0.2]]).sqrt())
    assert found.boxes[0, :, 0].tolist() == [4, 0, 0]


def test_the_unet_stays_as_it_is_while_the_classifier_learns() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    targets = some(BOXES, BOXES[:1])
    sum(model.train()(pictures(), targets, Noise.draw(targets, 8, 0)).values()).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    assert {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None} == {"classifier"}


def test_a_checkpoint_is_enough() -> None:
    model = small().eval()
    copy, classes = from_checkpoint({"architecture": SMALL, "model": model.state_dict(), "classes": ["cat", "dog"]})
    assert classes == ("cat", "dog")
    for ours, theirs in zip(model(pictures()), copy.eval()(pictures()), strict=True):
        assert torch.equal(ours, theirs)


def test_the_rate_rises_stays_and_falls() -> None:
    rate = schedule(0.1, 3, Iterations(pre=10, main=20))
    assert [round(rate(0, step), 4) for step in (0, 1, 3, 10, 20, 29)] == [0.025, 0.05, 0.1, 0.1, 0.05, 0.0006]


@pytest.mark.parametrize(("epoch", "batch", "step"), [(0, 0, 0), (0, 2, 2), (2, 1, 7), (3, 0, 9)])
def test_batches_end_with_the_last_iteration_wherever_they_begin(epoch: int, batch: int, step: int) -> None:
    state = TrainState(torch.nn.Linear(1, 1), None, epoch=epoch, batch=batch, step=step)  # type: ignore[arg-type]
    batches = Until(length=13, batch_size=4, seed=0, total=10, state=state)
    assert batches.epochs == 4
    drawn = 0
    for each in range(epoch, batches.epochs):
        batches.go_to(each, batch if each == epoch else 0)
        drawn += len(list(batches))
    assert step + drawn == 10


def test_extents_are_as_fine_in_bf16_as_in_float32() -> None:
    unet = small().unet
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        extents = unet.maps(unet.normalise(pictures())).extents
    assert not torch.equal(extents, extents.bfloat16().float())


def test_an_object_is_recalled_by_a_proposal_of_its_own_image_that_overlaps_it_by_half() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 10, 10], [5, 5, 5, 9]], dtype=np.float64)
    offsets, numbers = np.array([0, 2, 2, 4]), np.arange(3)
    index = LabelIndex(
        tree=Folder(Path()), split="validation", classes=("cat",), ids=np.array([3, 5, 8]), numbers=numbers,
        sizes=np.full((3, 2), 64), offsets=offsets, boxes=boxes, labels=np.ones(4, dtype=np.int64), problems=(),
    )  # fmt: skip
    proposals = [[3, 20, 20, 40, 30.5, 1, 1], [3, 0, 0, 10, 4.9, 1, 1], [5, 0, 0, 10, 10, 1, 1], [8, 5, 5, 5, 9, 1, 1]]
    assert recalled(index, np.array(proposals)).tolist() == [False, True, False, False]
    assert not recalled(index, np.empty((0, 7))).any()
