"""The training step for whole batches is torchvision's: same proposals, matches, losses and gradients; few waits."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou
from torchvision.ops import nms as reference_nms

from bench.detect_step import counted
from bench.operators import Operators
from bench.peers import torchvision_detector
from detect_train import matching, nms
from detect_train.data import collate
from detect_train.geometry import decode
from detect_train.heads import PyramidPool, sort_by_level
from detect_train.matching import match, sample
from detect_train.model import Detector, build
from detect_train.norms import FrozenNorm
from detect_train.targets import Batch, Targets, pad
from detect_train.transform import Transform
from tests.test_detect_model import SMALL
from utils.images import MEAN, STD

Case = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def built(norm: str, trainable_layers: int) -> tuple[Detector, FasterRCNN]:
    torch.manual_seed(0)
    how = {**SMALL, "norm": norm, "trainable_layers": trainable_layers, "detections_per_image": 100}
    mine, theirs = build(**how), torchvision_detector.build(**how)
    with torch.no_grad():
        for head in (mine.rpn.head.cls_logits, mine.rpn.head.bbox_pred, mine.roi_heads.box_predictor.cls_score):
            head.weight.mul_(20)
        mine.rpn.head.bbox_pred.bias.view(-1, 4)[:, 2:] = 1.2  # and are three times as large
    return mine, theirs


def pair(
    norm: str = "train",
    trainable_layers: int = 5,
    proposals_train: int = 50,
    box_batch_size: int = 32,
    pixels: int = 64,
) -> tuple[Detector, FasterRCNN]:
    """Ours and torchvision's with the same weights, which propose more than the anchors themselves."""
    mine, theirs = built(norm, trainable_layers)
    theirs.load_state_dict(mine.state_dict())
    for model in (mine, theirs):
        model.zero_grad(set_to_none=True)
        model.transform.min_size, model.transform.max_size = (pixels,), pixels * 3 // 2
        model.rpn._post_nms_top_n["testing"] = 200  # of all levels
        model.rpn._pre_nms_top_n["training"] = model.rpn._post_nms_top_n["training"] = proposals_train
        model.rpn.fg_bg_sampler = BalancedPositiveNegativeSampler(256, 0.5)
        model.roi_heads.fg_bg_sampler = BalancedPositiveNegativeSampler(box_batch_size, 0.25)
    mine.rpn.anchor_generator.kept.clear()
    return mine, theirs


def some_boxes(count: int, width: int, height: int, seed: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=random(seed)) * torch.tensor([width - 6.0, height - 6.0])
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 5], dim=1)


def case(*images: tuple[int, int, int]) -> Case:
    """Noise images, (height, width, number of boxes) each."""
    pictures, targets = [], []
    for seed, (height, width, count) in enumerate(images):
        pictures.append(torch.rand(3, height, width, generator=random(seed)))
        labels = torch.randint(1, 3, (count,), generator=random(seed))
        targets.append({"boxes": some_boxes(count, width, height, seed), "labels": labels})
    return pictures, targets


def equal_boxes() -> Case:
    pictures, targets = case((64, 64, 4), (64, 64, 2))
    targets[0]["boxes"][1:3] = targets[0]["boxes"][0]
    targets[0]["labels"] = torch.tensor([1, 2, 1, 2])
    return pictures, targets


CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "sizes": (case((64, 90, 2), (50, 64, 1), (80, 40, 3)), {}),
    "none in one": (case((64, 64, 0), (64, 64, 2)), {}),
    "none at all": (case((64, 64, 0), (60, 64, 0)), {}),
    "many": (case((64, 64, 40), (64, 80, 1)), {}),
    "equal": (equal_boxes(), {}),
    "crowded": (case((64, 64, 60), (64, 64, 50)), {"box_batch_size": 16, "proposals_train": 100}),
    "more places than proposals": (case((64, 64, 2), (64, 64, 7)), {"box_batch_size": 512}),
    "levels": (case((160, 200, 9), (160, 200, 9)), {"pixels": 160, "proposals_train": 200, "box_batch_size": 256}),
    "frozen": (case((64, 64, 2), (64, 90, 3)), {"norm": "frozen", "trainable_layers": 3}),
}


class SameKeys(BalancedPositiveNegativeSampler):
    """torchvision's rule, but what it draws are the places with the largest of given keys, as ours does."""

    def __init__(self, like: BalancedPositiveNegativeSampler, keys: list[torch.Tensor]) -> None:
        super().__init__(like.batch_size_per_image, like.positive_fraction)
        self.keys = keys

    def __call__(self, matched_idxs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        chosen: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for labels, keys in zip(matched_idxs, self.keys, strict=True):
            assert labels.shape == keys.shape
            left = self.batch_size_per_image
            most = int(left * self.positive_fraction)
            for masks, of_kind in zip(chosen, (labels >= 1, labels == 0), strict=True):
                rows = of_kind.nonzero()[:, 0]
                rows = rows[keys[rows].argsort(descending=True)][: min(left, most)]
                masks.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill_(0, rows, 1))
                left, most = left - len(rows), left
        return chosen


@pytest.mark.parametrize(("name", "together"), [*((name, False) for name in CASES), ("sizes", True)])
def test_losses_and_gradients_are_torchvision_s_for_the_same_sample(
    name: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if together:
        monkeypatch.setattr(nms, "ONE_BY_ONE", set())
    (images, targets), changes = CASES[name]
    mine, theirs = pair(**changes)
    proposed: list[Any] = []
    hook = mine.rpn.register_forward_hook(lambda module, given, out: proposed.append(out[0]))
    torch.manual_seed(1)
    losses = mine.train()(*collate(list(zip(images, targets, strict=True))))
    hook.remove()
    again = random(1)
    anchors = sum(level.numel() for level in mine.rpn.anchor_generator.kept.values()) // 4
    theirs.rpn.fg_bg_sampler = SameKeys(
        theirs.rpn.fg_bg_sampler, list(torch.rand(len(images), anchors, generator=again, dtype=torch.float64))
    )
    rows = proposed[0].valid.shape[1]
    padded = torch.rand(
        len(images), rows + max(1, *map(len, (t["boxes"] for t in targets))), generator=again, dtype=torch.float64
    )
    theirs.roi_heads.fg_bg_sampler = SameKeys(
        theirs.roi_heads.fg_bg_sampler,
        [
            torch.cat([keys[:rows][valid], keys[rows : rows + len(target["boxes"])]])
            for keys, valid, target in zip(padded, proposed[0].valid, targets, strict=True)
        ],
    )
    theirs.train().transform.eval()
    expected = theirs(images, targets)
    assert set(losses) == set(expected)
    for loss, value in expected.items():
        torch.testing.assert_close(losses[loss], value, rtol=1e-4, atol=1e-6)
    for each in (losses, expected):
        torch.stack(list(each.values())).sum().backward()
    wanted = dict(theirs.named_parameters())
    for parameter, value in mine.named_parameters():
        grad = wanted[parameter].grad
        assert (value.grad is None) == (grad is None), parameter
        if grad is not None:
            assert (value.grad - grad).norm() <= 1e-3 * grad.norm() + 1e-6, parameter


@pytest.mark.parametrize("together", [False, True])
def test_proposals_are_torchvision_s_in_order(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if together:
        monkeypatch.setattr(nms, "ONE_BY_ONE", set())
    mine, theirs = pair(proposals_train=40)
    sizes, shapes = [900, 300, 60, 12], [(60, 90), (90, 70), (32, 32)]
    anchors = some_boxes(sum(sizes), 90, 90, seed=3)
    objectness = torch.randn(3, sum(sizes), generator=random(4))
    offsets = torch.randn(3, sum(sizes), 4, generator=random(5))
    offsets[:, ::7, 2] = -30.0  # no width is left
    objectness[:, ::50] = torch.nan
    offsets[:, 5::90] = torch.nan
    decoded = theirs.rpn.box_coder.decode(offsets.view(-1, 4), [anchors] * 3).view(3, -1, 4)
    torch.testing.assert_close(decode(offsets, anchors, (1.0,) * 4), decoded, rtol=0, atol=0, equal_nan=True)
    expected, _ = theirs.train().rpn.filter_proposals(decoded, objectness, shapes, sizes)
    found = mine.train().rpn.propose(objectness, offsets, anchors, sizes, shapes)
    assert found.boxes.shape == (3, 40, 4)
    for boxes, valid, wanted in zip(*found, expected, strict=True):
        assert torch.equal(valid, torch.arange(40) < len(wanted)), "those that count come first"
        assert torch.equal(boxes[valid], wanted)
    assert min(map(len, expected)) < 40, "some image has fewer than there are places"


@pytest.mark.parametrize("devices", [{"cpu"}, set()])
def test_suppression_is_exact_also_along_chains(devices: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nms, "ONE_BY_ONE", devices)
    start = 2.0 * torch.arange(90)
    chain = torch.stack([start, torch.zeros(90), start + 10, torch.full((90,), 10.0)], dim=1)  # IoU .67 and .43
    crowd = some_boxes(90, 40, 40, seed=1)
    few = some_boxes(12, 30, 30, seed=2)
    levels = [
        (torch.stack([chain, crowd]), torch.rand(2, 90, generator=random()) < 0.9),
        (few[None].repeat(2, 1, 1), torch.ones(2, 12).bool()),
    ]
    levels[0][1][0] = True
    found = nms.keep_best(levels, 0.5)
    assert found.shape == (2, 102)
    for image in range(2):
        kept = []
        for first, (boxes, counts) in zip((0, 90), levels, strict=True):
            rows = counts[image].nonzero()[:, 0]
            scores = torch.arange(len(rows), 0, -1.0)
            kept += (first + rows[reference_nms(boxes[image, rows], scores, 0.5)]).tolist()
        assert found[image].nonzero()[:, 0].tolist() == sorted(kept)
    assert found[0, :90].tolist() == [True, False] * 45


@pytest.mark.parametrize("limit", [matching.LIMIT, 1])
@pytest.mark.parametrize("low", [0.3, 0.5])
def test_matches_are_torchvision_s(low: float, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "LIMIT", limit)
    objects = [some_boxes(count, 90, 90, seed=count) for count in (5, 0, 1, 30)]
    objects[3][4] = objects[3][9]
    objects[3][7] = torch.tensor([200.0, 200, 210, 220])  # overlaps nothing
    targets = pad([{"boxes": boxes, "labels": torch.ones(len(boxes)).long()} for boxes in objects])
    anchors = some_boxes(400, 90, 90, seed=99)
    rescue = low < 0.5
    found = match(targets, anchors[None], low=low, high=low + 0.2 * rescue, at_least_one=rescue)
    matcher = Matcher(low + 0.2 * rescue, low, allow_low_quality_matches=rescue)
    for image, boxes in enumerate(objects):
        wanted = matcher(box_iou(boxes, anchors)) if len(boxes) else torch.full((400,), -1)
        assert torch.equal(
            found.kind[image],
            torch.where(wanted >= 0, 1, -1 - wanted.clamp(max=-1)).to(torch.int8)
            * torch.where(wanted == -2, -1, 1).to(torch.int8),
        )
        stands = wanted >= 0
        assert torch.equal(found.nearest[image][stands], wanted[stands])
        assert stands.any() == bool(len(boxes))


@pytest.mark.parametrize(
    ("positive", "negative", "size", "expected"),
    [
        (30, 50, 16, (4, 12)),
        (2, 50, 16, (2, 14)),
        (30, 5, 16, (4, 5)),
        (0, 50, 16, (0, 16)),
        (30, 0, 16, (4, 0)),
        (3, 2, 512, (3, 2)),
        (5, 5, 3, (0, 3)),
    ],
)
def test_a_sample_is_uniform_without_replacement_and_has_torchvision_s_numbers(
    positive: int, negative: int, size: int, expected: tuple[int, int]
) -> None:
    images = 3000
    kind = torch.tensor([1] * positive + [0] * negative + [-1] * 20)
    kind = kind[torch.randperm(len(kind), generator=random())]
    masks = BalancedPositiveNegativeSampler(size, 0.25)([kind])
    assert tuple(int(mask[0].sum()) for mask in masks) == expected
    torch.manual_seed(0)
    rows, objects, taken = sample(kind.to(torch.int8).expand(images, -1), size, 0.25)
    assert (objects & ~taken).sum() == 0
    drawn = torch.zeros(images, len(kind)).scatter_add_(1, rows, taken.float())
    assert drawn.max() == 1 and (drawn[:, kind < 0] == 0).all()
    for mask, number, count in ((kind > 0, expected[0], positive), (kind == 0, expected[1], negative)):
        some = drawn[:, mask]
        assert (some.sum(dim=1) == number).all()
        if not 0 < number < count:
            continue
        share = number / count
        spread = 5 * (share * (1 - share) / images) ** 0.5
        assert (some.mean(dim=0) - share).abs().max() < spread
        both = (some.T @ some / images)[~torch.eye(count).bool()]  # of each two, drawn together
        assert (both - share * (number - 1) / (count - 1)).abs().max() < 5 * (share * share / images) ** 0.5
    assert (kind.expand(images, -1).gather(1, rows) > 0)[objects].all()


def test_pooling_is_torchvision_s() -> None:
    features = {
        name: torch.randn(2, 5, 512 // stride, 512 // stride, generator=random(stride)).requires_grad_()
        for name, stride in {"0": 4, "1": 8, "2": 16, "3": 32, "pool": 64}.items()
    }
    sides = torch.linspace(6, 500, 60)[:, None]
    corners = torch.rand(2, 60, 2, generator=random()) * (512 - sides)
    boxes = torch.cat([corners, corners + sides], dim=2)
    chosen = torch.rand(2, 60, generator=random()) < 0.7
    order = sort_by_level(boxes, chosen)
    assert order.per_image == chosen.sum(dim=1).tolist() and min(order.per_level) > 0
    pooled = PyramidPool()(features, boxes, order)[order.rows.argsort()]
    lists = [some[mask] for some, mask in zip(boxes, chosen, strict=True)]
    expected = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(features, lists, [(512, 512)] * 2)
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize("norm", ["train", "frozen"])
def test_detections_are_torchvision_s(norm: str) -> None:
    for pixels, shapes in ((64, [(64, 90), (50, 64), (80, 40)]), (64, [(70, 50)] * 3), (160, [(160, 200), (80, 80)])):
        mine, theirs = (model.eval() for model in pair(norm, pixels=pixels))
        images = [torch.rand(3, *shape, generator=random(seed)) for seed, shape in enumerate(shapes)]
        with torch.no_grad():
            found, expected = mine(images), theirs(images)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one["labels"], other["labels"]) and len(one["labels"]) > 20
            torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shapes", [[(50, 70), (50, 70)], [(50, 70), (70, 50), (90, 200)], [(64, 64)]])
def test_images_and_boxes_are_resized_as_torchvision_does(shapes: list[tuple[int, int]]) -> None:
    images, targets = case(*((*shape, 2) for shape in shapes))
    theirs = GeneralizedRCNNTransform(64, 100, list(MEAN), list(STD))
    expected, boxes = theirs(images, targets)
    found, padded = Transform((64,), 100)(*collate(list(zip(images, targets, strict=True))))
    assert found.image_sizes == expected.image_sizes
    torch.testing.assert_close(found.tensors, expected.tensors)
    for row, target in zip(padded.boxes, boxes, strict=True):
        torch.testing.assert_close(row, target["boxes"], rtol=0, atol=0)


def test_each_image_of_a_training_batch_has_a_size_of_those_there_are() -> None:
    transform = Transform((32, 64), 200).train()
    torch.manual_seed(0)
    shorter = [min(size) for size in transform(torch.rand(30, 3, 40, 40))[0].image_sizes]
    assert set(shorter) == {32, 64} and 5 < shorter.count(32) < 25
    assert {size for _, size in transform.eval()(torch.rand(4, 3, 40, 40))[0].image_sizes} == {64}


def test_a_frozen_norm_is_torchvision_s_and_keeps_bf16() -> None:
    mine, theirs = FrozenNorm(6), FrozenBatchNorm2d(6)
    state = {name: torch.rand(6, generator=random()) + 0.2 for name in theirs.state_dict()}
    for norm in (mine, theirs):
        norm.load_state_dict(state)
    results = []
    for norm in (mine.train(), theirs):
        x = torch.randn(2, 6, 5, 5, generator=random()).requires_grad_()
        y = norm(x)
        (y * y).sum().backward()
        results.append((y, x.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())
    assert mine(torch.randn(2, 6, 5, 5).bfloat16()).dtype == torch.bfloat16


def test_few_proposals_cost_no_padding() -> None:
    (images, targets), changes = CASES["more places than proposals"]
    pooled = []
    for model, given in zip(pair(**changes), (pad(targets), targets), strict=True):
        model.train().roi_heads.box_head.register_forward_hook(lambda module, given, out: pooled.append(len(out)))
        model(images, given)
    assert pooled[0] == pooled[1] < 2 * 100


def operators(model: nn.Module, *given: Any) -> Operators:
    """What a step asks for."""
    return counted(lambda: torch.stack(list(model.train()(*given).values())).sum().backward())


def test_the_host_waits_a_third_as_often_as_torchvision_s_and_no_more_for_more_images() -> None:
    mine, theirs = pair()
    theirs.transform.torch_choice = lambda sizes: sizes[-1]  # its draw is no question to the device
    pictures, targets = case(*[(64, 64, 3)] * 8)
    two, eight = (operators(mine, torch.stack(pictures[:n]), pad(targets[:n])) for n in (2, 8))
    expected = operators(theirs, pictures, targets)
    assert 3 * eight.waits.total() <= expected.waits.total()
    assert eight.waits == two.waits and eight.calls == two.calls < expected.calls
    of_many_sizes = operators(mine, *collate(list(zip(*CASES["sizes"][0], strict=True))))
    assert of_many_sizes.waits == two.waits


def test_a_batch_is_one_tensor_or_a_list_and_its_targets_are_padded() -> None:
    images, targets = case((40, 50, 2), (40, 50, 0))
    batch = collate(list(zip(images, targets, strict=True)))
    assert isinstance(batch.images, torch.Tensor) and batch.images.shape == (2, 3, 40, 50)
    assert torch.equal(batch.targets.boxes[0], targets[0]["boxes"]) and batch.targets.counts.tolist() == [2, 0]
    assert batch.targets.present().tolist() == [[True, True], [False, False]]
    images, targets = case((40, 50, 0), (30, 50, 0))
    batch = collate(list(zip(images, targets, strict=True)))
    assert isinstance(batch.images, list) and [image.shape for image in batch.images] == [(3, 40, 50), (3, 30, 50)]
    assert batch.targets.boxes.shape == (2, 1, 4) and batch.targets.labels.dtype == torch.int64
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and isinstance(moved.targets, Targets)
    assert all(part.is_meta for part in (*moved.images, *moved.targets))


def test_autocast_makes_the_images_channels_last() -> None:
    seen: list[torch.Tensor] = []
    model: nn.Module = build(**SMALL).eval()
    model.get_submodule("backbone").register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(torch.rand(2, 3, 64, 64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.rand(2, 3, 64, 64))
    assert [images.is_contiguous(memory_format=torch.channels_last) for images in seen] == [False, True]


def test_a_diverged_detector_has_losses_that_are_not_finite_even_without_a_proposal() -> None:
    mine, _ = pair()
    mine.rpn.head.bbox_pred.bias.data.fill_(math.nan)
    pictures, targets = case((64, 64, 0), (64, 64, 0))
    losses = mine.train()(torch.stack(pictures), pad(targets))
    assert not all(loss.isfinite() for loss in losses.values())
