"""MoCo v2's augmentation: the numbers that are drawn, and what the three back ends make of them."""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ssl_train import augment_device, augment_opencv, augment_pil
from ssl_train.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, Streams, View, draw
from utils.images import MEAN, STD
from utils.sample_scenes import scene

PUBLISHED: dict[str, Any] = {
    "crop_scale": (0.2, 1.0), "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8,
    "grayscale_p": 0.2, "blur_p": 0.5, "blur_sigma": (0.1, 2.0),
}  # fmt: skip
SIDE = 112
SIZES = [(112, 112), (150, 100), (60, 110), (300, 200)]  # width, height: crops are enlarged, shrunk, and both
SIGMA = 2.0
RATIO = [3 / 4, 4 / 3]


def plain(size: tuple[int, int], **changes: Any) -> View:
    """The whole image, unchanged but for `changes`."""
    return View(0, 0, size[1], size[0], (1, 1, 1, 0), (), False, 0.0, False)._replace(**changes)


def many(count: int, size: tuple[int, int], **changes: Any) -> list[View]:
    streams = Streams(seed=3, epoch=0)
    return [draw(streams.at(index, 0), *size, **{**PUBLISHED, **changes}) for index in range(count)]


@cache
def picture(width: int, height: int) -> np.ndarray:
    return np.asarray(scene(np.random.default_rng(width), width, height, 3)[0])


def levels(views: torch.Tensor) -> np.ndarray:
    """(n, 3, S, S) as normalised -> (n, S, S, 3) in levels of 255."""
    return ((views.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255).numpy()


def apart(views: list[View], size: tuple[int, int], side: int = SIDE, cut: bool = False) -> dict[str, np.ndarray]:
    """How far each back end is from Pillow, in levels; `cut`: in whole ones, cut off as Pillow does."""
    image = picture(*size)
    pillow = np.stack([augment_pil.apply(image, view, side) for view in views]).astype(float)
    crops = np.stack([augment_opencv.crop(image, view, side) for view in views])
    table, whole = augment_device.numbers(views, SIGMA), np.stack([image] * len(views))
    results = {
        "opencv": np.stack([augment_opencv.apply(image, view, side) for view in views]),
        "device": levels(augment_device.apply(torch.from_numpy(whole), table, side)),
        "device on crops": levels(augment_device.apply(torch.from_numpy(crops), table, None)),
    }
    return {name: np.abs((np.floor(result + 1e-3) if cut else result) - pillow) for name, result in results.items()}


def same_distribution(a: np.ndarray, b: np.ndarray) -> bool:
    """Kolmogorov-Smirnov's test of two samples, with one false alarm in a thousand."""
    everything = np.sort(np.concatenate((a, b)))
    distance = np.abs(
        np.searchsorted(np.sort(a), everything, "right") / len(a)
        - np.searchsorted(np.sort(b), everything, "right") / len(b)
    )
    return float(distance.max()) < 1.95 * (1 / len(a) + 1 / len(b)) ** 0.5


@pytest.mark.parametrize("size", [(224, 224), (500, 375), (100, 260)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shape = torch.empty(3, size[1], size[0])
    theirs = [transforms.RandomResizedCrop.get_params(shape, [0.2, 1.0], RATIO) for _ in range(2000)]
    ours = [view[:4] for view in many(4000, size)]
    for a, b in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert same_distribution(a, b)
    for top, left, height, width in ours:
        assert min(top, left) >= 0 and top + height <= size[1] and left + width <= size[0]


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000)])
def test_where_no_crop_fits_it_is_torchvisions_centre(size: tuple[int, int]) -> None:
    expected = transforms.RandomResizedCrop.get_params(torch.empty(3, size[1], size[0]), [0.2, 1.0], RATIO)
    assert {view[:4] for view in many(5, size)} == {expected}


def test_probabilities_and_factors_are_the_published_ones() -> None:
    views = many(6000, (64, 64))
    for what, probability in (
        ([bool(view.order) for view in views], 0.8), ([view.grayscale for view in views], 0.2),
        ([view.sigma > 0 for view in views], 0.5), ([view.flip for view in views], 0.5),
    ):  # fmt: skip
        assert abs(np.mean(what) - probability) < 3.3 * (probability * (1 - probability) / 6000) ** 0.5
    _, *theirs = zip(*(transforms.ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])
                       for _ in range(2000)), strict=True)  # fmt: skip
    for a, b in zip(np.array([view.factors for view in views]).T, np.array(theirs), strict=True):
        assert same_distribution(a, b)
    sigmas = np.array([view.sigma for view in views if view.sigma])
    assert same_distribution(sigmas, np.linspace(0.1, 2.0, 3000))
    together = np.array([[bool(view.order), view.grayscale, view.sigma > 0, view.flip] for view in views]).T
    assert np.abs(np.corrcoef(together) - np.eye(4)).max() < 3.3 / 6000**0.5, "drawn independently"


def test_every_order_of_the_jitter_is_as_likely() -> None:
    orders = [view.order for view in many(6000, (64, 64), jitter_p=1.0)]
    counts = np.array([orders.count(order) for order in permutations(range(4))])
    assert counts.sum() == 6000
    assert ((counts - 250) ** 2 / 250).sum() < 49.7, "chi-squared with 23 degrees of freedom, 99.9 %"


def test_operations_without_strength_are_left_out() -> None:
    orders = [view.order for view in many(50, (64, 64), jitter_p=1.0, jitter=(0.4, 0.0, 0.4, 0.0))]
    assert {frozenset(order) for order in orders} == {frozenset({BRIGHTNESS, SATURATION})}


def test_a_stream_is_the_same_whenever_it_is_asked_for_and_no_other() -> None:
    first = Streams(1, 2).at(3, 1).random(100)
    streams = Streams(1, 2)
    streams.at(3, 0).random(7)
    assert np.array_equal(streams.at(3, 1).random(100), first)
    for numbers in ((0, 2, 3, 1), (1, 0, 3, 1), (1, 2, 4, 1), (1, 2, 3, 0)):
        other = Streams(*numbers[:2]).at(*numbers[2:]).random(100)
        assert not np.intersect1d(first, other).size


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_within_a_level_of_pillows(size: tuple[int, int]) -> None:
    views = [view._replace(order=(), grayscale=False, sigma=0.0) for view in many(12, size)]
    assert {view.flip for view in views} == {True, False}
    for name, difference in apart(views, size).items():
        assert difference.max() < 1.01, name


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
def test_brightness_contrast_and_saturation_are_within_a_level_of_pillows(operation: int) -> None:
    size = (SIDE, SIDE)
    factors = [(factor,) * 3 + (0.0,) for factor in (0.6, 0.77, 1.0, 1.21, 1.4)]
    views = [plain(size, order=(operation,), factors=given) for given in factors]
    for name, difference in apart([*views, plain(size, grayscale=True)], size, cut=True).items():
        assert difference.max() <= 1, name


@pytest.mark.parametrize("size", SIZES)
def test_hue_and_blur_are_within_the_stated_bounds(size: tuple[int, int]) -> None:
    turns = [plain(size, order=(HUE,), factors=(1, 1, 1, turn)) for turn in (-0.1, -0.063, -0.01, 0.0, 0.04, 0.1)]
    blurs = [plain(size, sigma=sigma) for sigma in (0.1, 0.3, 0.5, 0.8, 1.2, 1.7, 2.0)]
    bounds = {"opencv": ((0.5, 8, 13), (0.5, 3, 4)), "device": ((0.5, 5, 10), (0.5, 4, 22))}
    for views, which in ((turns, 0), (blurs, 1)):
        for name, difference in apart(views, size).items():
            mean, most, worst = bounds[name.split()[0]][which]
            found = difference.mean(), np.percentile(difference, 99.9), difference.max()
            assert found[0] <= mean and found[1] <= most and found[2] <= worst, (name, which, found)


def test_operations_are_done_in_the_order_that_was_drawn() -> None:
    size = (SIDE, SIDE)
    strong = (1.4, 1.4, 0.6, 0.1)
    forward, backward = (BRIGHTNESS, CONTRAST, SATURATION, HUE), (HUE, SATURATION, CONTRAST, BRIGHTNESS)
    image = picture(*size)
    other = np.abs(
        np.subtract(*(augment_pil.apply(image, plain(size, order=order, factors=strong), SIDE).astype(float)
                      for order in (forward, backward)))
    )  # fmt: skip
    for order in (forward, backward, (SATURATION, HUE, BRIGHTNESS, CONTRAST)):
        for name, difference in apart([plain(size, order=order, factors=strong)], size).items():
            assert difference.mean() < other.mean() / 2, (name, order)


def test_whole_views_are_close_to_the_published_pipeline() -> None:
    for name, difference in apart(many(40, (150, 100)), (150, 100)).items():
        assert difference.mean() < 2 and np.percentile(difference, 99.9) < 12, name


@pytest.mark.parametrize(
    ("published", "changes"),
    [
        (transforms.ColorJitter(brightness=(1.3, 1.3)), {"order": (BRIGHTNESS,), "factors": (1.3, 1, 1, 0)}),
        (transforms.ColorJitter(contrast=(0.7, 0.7)), {"order": (CONTRAST,), "factors": (1, 0.7, 1, 0)}),
        (transforms.ColorJitter(saturation=(1.2, 1.2)), {"order": (SATURATION,), "factors": (1, 1, 1.2, 0)}),
        (transforms.ColorJitter(hue=(0.08, 0.08)), {"order": (HUE,), "factors": (1, 1, 1, 0.08)}),
        (transforms.RandomGrayscale(1.0), {"grayscale": True}),
        (transforms.RandomHorizontalFlip(1.0), {"flip": True}),
        (transforms.Resize((SIDE, SIDE)), {}),
    ],
)
def test_the_reference_does_what_torchvisions_transforms_do(published: Any, changes: dict[str, Any]) -> None:
    size = (SIDE, SIDE) if changes else (150, 100)
    expected = np.asarray(published(Image.fromarray(picture(*size))))
    assert np.array_equal(augment_pil.apply(picture(*size), plain(size, **changes), SIDE), expected)
