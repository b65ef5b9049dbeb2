"""What is behind an evaluation's numbers: how sure they are, which classes, which kinds of error, which images.

All from what `detections_file.load` returns; torch-free. What takes long is kept for the object it was computed from.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluate import bootstrap
from evaluate.bootstrap import Interval, Intervals
from evaluate.detections_file import Evaluated
from utils import coco_backends
from utils.coco import summarize
from utils.coco_names import METRICS

if TYPE_CHECKING:
    from hotcoco import COCOeval

IOU = 0.5  # for all that tells right from wrong


class Curves(NamedTuple):
    """Precision at each recall; NaN for a class without ground truth."""

    recall: np.ndarray  # (101,)
    precision: np.ndarray  # (C, 101) at IoU .50
    means: dict[str, np.ndarray]  # over classes, (101,) at IoU ".50", ".75" and ".50:.95"


class Picture(NamedTuple):
    """One image with what is right and wrong in it."""

    image: int  # index i
    rows: np.ndarray  # (k,) int64: detections in it whose scores count
    correct: np.ndarray  # (k,) bool
    missed: np.ndarray  # (m,) int64: rows of boxes that nothing found


class Ranked(NamedTuple):
    score: float  # detections below it do not count
    best: list[Picture]
    worst: list[Picture]
    confident: list[Picture]  # by the score of what is wrong, the highest first


@lru_cache(maxsize=2)
def evaluator(evaluated: Evaluated) -> COCOeval:
    """hotcoco's evaluator, evaluated and accumulated. Raises: InputError when hotcoco cannot be imported."""
    coco_backends.library("hotcoco")
    truth = coco_backends.Truth(
        ids=evaluated.ids,
        classes=len(evaluated.classes),
        images=np.repeat(evaluated.ids, np.diff(evaluated.offsets)),
        labels=evaluated.labels,
        boxes=evaluated.boxes,
        crowd=np.zeros(len(evaluated.labels), dtype=bool),
    )
    return coco_backends.hotcoco_evaluator(truth, evaluated.detections)


def stats(evaluated: Evaluated) -> dict[str, float]:
    """The twelve numbers, to the last bit those of metrics.json."""
    return summarize(coco_backends.curves_of(evaluator(evaluated)))[0]


def intervals(evaluated: Evaluated) -> Intervals:
    """The twelve numbers with the interval that a far larger test set's would lie in.

    The bootstrap over images says how much higher AP is on few images than on many, by as much as its resamples are
    higher still: intervals are mirrored at the value for it, and stretched to hold the value itself.
    """

    def interval(value: float, low: float, high: float) -> Interval:
        return Interval(value, max(0.0, min(value, 2 * value - high)), min(1.0, max(value, 2 * value - low)))

    return bootstrap.percentiles(evaluated, stats(evaluated), bootstrap.resampled(evaluated), interval)


def differences(base: Evaluated, other: Evaluated) -> Intervals:
    """`other` - `base` of the twelve numbers, which are of the same images: each resample draws the same for both."""
    one, two = stats(base), stats(other)
    values = {name: two[name] - one[name] for name in METRICS}
    draws = [bootstrap.resampled(each) for each in (base, other)]
    both = min(map(len, draws))
    return bootstrap.percentiles(base, values, draws[1][:both] - draws[0][:both], Interval)


def per_class(evaluated: Evaluated) -> dict[str, float]:
    """AP by class name; -1 without ground truth."""
    precision = coco_backends.curves_of(evaluator(evaluated)).precision[..., 0, -1]  # (IoU, recall, class)
    by_class = {name: precision[:, :, k] for k, name in enumerate(evaluated.classes)}
    return {name: float(values[values > -1].mean()) if values.max() > -1 else -1.0 for name, values in by_class.items()}


def curves(evaluated: Evaluated) -> Curves:
    """Precision over recall, as COCO interpolates it."""
    precision = coco_backends.curves_of(evaluator(evaluated)).precision[..., 0, -1].transpose(0, 2, 1)
    measured = (precision > -1).any(axis=(0, 2))
    means = {
        name: precision[of_iou][:, measured].mean(axis=(0, 1)) if measured.any() else np.full(101, np.nan)
        for name, of_iou in ((".50", slice(0, 1)), (".75", slice(5, 6)), (".50:.95", slice(None)))
    }
    return Curves(bootstrap.RECALLS, np.where(measured[:, None], precision[0], np.nan), means)


def confusion(evaluated: Evaluated) -> np.ndarray:
    """(C + 1, C + 1) int64: boxes of each class (rows) by the class they are detected as; last: background.

    Detections below `best_score` do not count: else everything is detected as everything.
    """
    found = evaluator(evaluated).confusion_matrix(iou_thr=IOU, min_score=best_score(evaluated))
    return found["matrix"].astype(np.int64)


def best_score(evaluated: Evaluated) -> float:
    """The score from which on detections count so that F1 at IoU .5, over all classes, is highest; 1 for none right."""
    right = matches(evaluated) >= 0
    scores = evaluated.detections[:, 5]
    order = np.argsort(-scores, kind="stable")
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + max(1, len(evaluated.labels)))
    last = np.append(np.diff(scores[order]) < 0, True)[: len(order)]  # equal scores count together
    return float(scores[order][np.argmax(np.where(last, f1, 0))]) if right.any() else 1.0


def ranked(evaluated: Evaluated, count: int) -> Ranked:
    """`count` images of the highest and of the lowest F1 at IoU .5, and those with the most confident mistakes.

    Detections below `best_score` do not count. Images with nothing in them and nothing found are in none of the lists.
    """
    limit, matched = best_score(evaluated), matches(evaluated)
    images = len(evaluated.ids)
    order = np.argsort(evaluated.ids, kind="stable")
    rows = np.flatnonzero(evaluated.detections[:, 5] >= limit)
    of_row = order[np.searchsorted(evaluated.ids[order], evaluated.detections[rows, 0].astype(np.int64))]
    is_right = matched[rows] >= 0
    hits, wrong = (np.bincount(of_row[kept], minlength=images) for kept in (is_right, ~is_right))
    boxes = np.diff(evaluated.offsets)
    size = hits + wrong + boxes
    f1 = 2 * hits / np.maximum(size, 1)
    some = np.flatnonzero(size)
    highest = np.zeros(images)
    np.maximum.at(highest, of_row[~is_right], evaluated.detections[rows[~is_right], 5])
    found = np.zeros(len(evaluated.labels), dtype=bool)
    found[matched[rows[is_right]]] = True

    def picture(image: int) -> Picture:
        here = of_row == image
        first, end = evaluated.offsets[image : image + 2]
        return Picture(image, rows[here], is_right[here], first + np.flatnonzero(~found[first:end]))

    best = some[np.lexsort((-hits[some], -f1[some]))]
    worst = some[np.lexsort((-(size - 2 * hits)[some], f1[some]))]
    confident = np.lexsort((np.arange(images), -highest))
    confident = confident[highest[confident] > 0]
    return Ranked(limit, *([picture(int(i)) for i in each[:count]] for each in (best, worst, confident)))


@lru_cache(maxsize=2)
def matches(evaluated: Evaluated) -> np.ndarray:
    """(n,) int64: the box each detection matches at IoU .5, -1 for none."""
    found = evaluator(evaluated).image_diagnostics(iou_thr=IOU)["dt_match"]
    result = np.full(len(evaluated.detections), -1, dtype=np.int64)
    result[np.fromiter(found, np.int64, len(found)) - 1] = np.fromiter(found.values(), np.int64, len(found)) - 1
    return result
