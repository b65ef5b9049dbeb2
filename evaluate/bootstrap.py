"""COCO's twelve numbers on images drawn again and again with replacement: what another test set might have given.

The boxes are matched once, as COCO does it; drawing an image twice gives what is in it a weight of 2. With weights of 1
the numbers are COCO's. (hotcoco.compare of 1.3 counts an image that is drawn twice once: a quarter too narrow.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from evaluate.detections_file import Evaluated
from evaluate.matching import AREAS, IOUS, MOST, Found, match
from utils.coco_names import METRICS

RECALLS = np.linspace(0, 1, 101)
BATCH = 200_000  # detections times resamples that are computed at once: what fits the cache
SEED = 0
RESAMPLES = 200, 1000  # at least and at most
WORK = 200_000_000  # detections times resamples, about a minute of one core
FEWEST = 8  # images: with fewer, resamples without any of them are too many
PERCENT = 2.5, 97.5


class Interval(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    lower: float
    upper: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval, of a difference, leaves out 0."""
        return not self.lower <= 0 <= self.upper


Intervals = dict[str, Interval | None]  # of METRICS; None: too few images say something about it, or none


@lru_cache(maxsize=8)
def resampled(evaluated: Evaluated) -> np.ndarray:
    """(resamples, 12): the numbers on images drawn with replacement, the same for all runs on the same images."""
    fewest, most = RESAMPLES
    resamples = int(np.clip(WORK // max(1, len(evaluated.detections)), fewest, most))
    return numbers(evaluated, draws(len(evaluated.ids), resamples, SEED))


def percentiles(
    evaluated: Evaluated,
    values: Mapping[str, float],
    draws: np.ndarray,
    interval: Callable[[float, float, float], Interval],
) -> Intervals:
    """`interval` of each value and the percentiles of its column of `draws`."""
    image = np.repeat(np.arange(len(evaluated.ids)), np.diff(evaluated.offsets))
    areas = (evaluated.boxes[:, 2:] - evaluated.boxes[:, :2]).prod(axis=1)
    enough = [len(np.unique(image[(areas >= low) & (areas <= high)])) >= FEWEST for low, high in AREAS]
    known = [*[enough[0]] * 3, *enough[1:]] * 2
    return {
        name: interval(values[name], *np.nanpercentile(column, PERCENT).tolist()) if measured else None
        for name, measured, column in zip(METRICS, known, draws.T, strict=True)
    }


def numbers(evaluated: Evaluated, weights: np.ndarray) -> np.ndarray:
    """The twelve numbers for each row of `weights`.

    Args:
        weights: (B, N) int: how often each image is there.

    Returns: (B, 12) float64; NaN where there is no ground truth.
    """
    found = match(evaluated)
    rows = max(1, BATCH // max(1, len(evaluated.detections)))
    parts = [_numbers(found, weights[at : at + rows].astype(np.int64)) for at in range(0, len(weights), rows)]
    return np.concatenate(parts)


def draws(images: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, images) int16: how often each image is drawn. Of more resamples the first are the same."""
    random, chances = np.random.default_rng(seed), np.full(images, 1 / images)
    return np.stack([random.multinomial(images, chances).astype(np.int16) for _ in range(resamples)])


def _numbers(found: list[Found], weights: np.ndarray) -> np.ndarray:
    """(B, 12) of a few resamples."""
    precisions, recalls = zip(*(_averages(each, weights) for each in found), strict=True)
    everything = precisions[0]  # (B, 10)
    columns = [everything.mean(axis=1), everything[:, 0], everything[:, 5]]
    columns += [each.mean(axis=1) for each in precisions[1:]]
    columns += [recalls[0][:, :, most].mean(axis=1) for most in range(3)]
    columns += [each[:, :, -1].mean(axis=1) for each in recalls[1:]]
    assert len(columns) == len(METRICS)
    return np.column_stack(columns)


def _averages(found: Found, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision (B, 10) and recall (B, 10, 3) by IoU, and 1, 10 and 100 detections; the mean over classes."""
    real = weights @ found.boxes  # (B, C)
    measured = (real > 0).sum(axis=1)
    of_detections = weights[:, found.images]
    before = np.zeros((len(weights), len(found.images) + 1), dtype=np.int64)
    precision, recall = np.zeros((len(weights), len(IOUS))), np.zeros((len(weights), len(IOUS), 3))
    for iou, right in enumerate(found.right):
        if iou < len(found.counted):
            np.cumsum(of_detections * found.counted[iou], axis=1, out=before[:, 1:])
        label = found.labels[right]
        first = np.flatnonzero(np.diff(label, prepend=-1))
        if len(first) == 0:
            continue
        begins = np.repeat(first, np.diff(np.append(first, len(right))))
        weight = of_detections[:, right]
        so_far = np.cumsum(weight, axis=1)
        hits = so_far - (so_far[:, begins] - weight[:, begins])
        seen = before[:, right + 1] - before[:, found.starts[label]]
        # the best precision at this recall or a higher one, class by class
        shift = 2.0 * (found.boxes.shape[1] - label)
        reached = np.divide(hits, seen, out=np.zeros(hits.shape), where=seen > 0) + shift
        reached = np.maximum.accumulate(reached[:, ::-1], axis=1)[:, ::-1] - shift
        total = real[:, label]
        steps = np.searchsorted(RECALLS, np.divide(hits, total, out=np.zeros(hits.shape), where=total > 0), "right")
        steps -= np.where(np.arange(len(right)) == begins, 0, np.roll(steps, 1, axis=1))
        sums = np.add.reduceat(reached * steps, first, axis=1) / len(RECALLS)
        reals = real[:, label[first]]
        precision[:, iou] = np.where(reals > 0, sums, 0).sum(axis=1)
        for column, most in enumerate((1, 10, MOST)):
            of_class = np.add.reduceat(weight * (found.ranks[right] < most), first, axis=1)
            share = np.divide(of_class, reals, out=np.zeros(reals.shape), where=reals > 0)
            recall[:, iou, column] = share.sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0: nothing is measured
        return precision / measured[:, None], recall / measured[:, None, None]
