"""COCO's matching and its curves by two libraries that agree bit for bit, both from arrays.

`pycocotools` (Lin et al., "Microsoft COCO", 2014) is the reference. `hotcoco` is a Rust port of it; it makes no Python
object per box, and takes about a hundredth of the time and a tenth of the memory.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from utils import log
from utils.coco_names import Evaluator
from utils.errors import InputError

if TYPE_CHECKING:
    from hotcoco import COCOeval

Library = Literal["hotcoco", "pycocotools"]


class Truth(NamedTuple):
    """N images with M boxes of classes 1..C."""

    ids: np.ndarray  # (N,) int64, distinct, 0 or more, in any order
    classes: int  # C
    images: np.ndarray  # (M,) int64: the id of each box's image
    labels: np.ndarray  # (M,) int64
    boxes: np.ndarray  # (M, 4) float64 x1, y1, x2, y2
    crowd: np.ndarray  # (M,) bool: a region of many objects, neither found nor missed


class Curves(NamedTuple):
    """COCO's ten IoU thresholds (T), 101 recalls (R), C classes, four area ranges (A), 1, 10 and 100 detections (D).

    -1 where there is no ground truth.
    """

    precision: np.ndarray  # (T, R, C, A, D) float64
    recall: np.ndarray  # (T, C, A, D) float64
    scores: np.ndarray  # (T, R, C, A, D) float64: the least score that reaches the recall


@functools.cache  # one warning, not one an epoch
def library(evaluator: Evaluator) -> Library:
    """The library that `evaluator` means here. Raises: InputError when it is hotcoco and cannot be imported."""
    if evaluator == "pycocotools":
        return "pycocotools"
    try:
        import hotcoco  # noqa: F401
    except ImportError as error:
        if evaluator == "hotcoco":
            raise InputError(
                f"evaluator=hotcoco: {error}: install hotcoco, or set evaluator=pycocotools: slower, the same numbers"
            ) from None
        log.warning(f"hotcoco cannot be imported ({error}): pycocotools evaluates, slower, with the same numbers")
        return "pycocotools"
    return "hotcoco"


def curves(evaluator: Evaluator, truth: Truth, detections: np.ndarray) -> Curves:
    """Match the detections of each image and class with the ground truth, and accumulate.

    Args:
        detections: (n, 7) float64: image id, x1, y1, x2, y2, score, label; all finite, of known images and labels,
            not inverted. Of equal scores the one further up ranks first.
    """
    return LIBRARIES[library(evaluator)](truth, detections)


def by_hotcoco(truth: Truth, detections: np.ndarray) -> Curves:
    return curves_of(hotcoco_evaluator(truth, detections))


def hotcoco_evaluator(truth: Truth, detections: np.ndarray) -> COCOeval:
    """hotcoco's evaluator, evaluated and accumulated: its boxes have the ids 1..M, its detections 1..n, in our order.

    Nothing here grows with the number of boxes but arrays.
    It computes with threads, which do not outlive a fork: a process that has evaluated must not fork one that will.
    """
    from hotcoco import COCO, COCOeval

    images, categories = _images_and_categories(truth)
    real = COCO.from_arrays(
        images, categories, truth.images, truth.labels, _corner_and_size(truth.boxes), iscrowd=truth.crowd
    )
    evaluator = COCOeval(real, real.load_res(_results(detections)), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


def by_pycocotools(truth: Truth, detections: np.ndarray) -> Curves:
    """The reference, with a dict per box. What it prints is left out."""
    from pycocotools.cocoeval import COCOeval

    images, categories = _images_and_categories(truth)
    boxes = _corner_and_size(truth.boxes)
    columns = (truth.images.tolist(), truth.labels.tolist(), boxes.tolist(), truth.crowd.tolist())
    annotations = [
        {
            "id": number,  # from 1: a match with annotation 0 would count as none
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(crowd),
        }
        for number, (image, label, box, crowd) in enumerate(zip(*columns, strict=True), start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        real = _reference({"images": images, "categories": categories, "annotations": annotations})
        none = {**real.dataset, "annotations": []}  # loadRes fails on it
        found = real.loadRes(_results(detections)) if len(detections) else _reference(none)
        evaluator = COCOeval(real, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    return curves_of(evaluator)


LIBRARIES: dict[Library, Callable[[Truth, np.ndarray], Curves]] = {
    "hotcoco": by_hotcoco,
    "pycocotools": by_pycocotools,
}


def _images_and_categories(truth: Truth) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    categories = [{"id": label, "name": str(label)} for label in range(1, truth.classes + 1)]
    return [{"id": image} for image in truth.ids.tolist()], categories


def _corner_and_size(boxes: np.ndarray) -> np.ndarray:
    """x1, y1, x2, y2 -> x1, y1, width, height."""
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def _results(detections: np.ndarray) -> np.ndarray:
    """The rows as both libraries load them: image id, x1, y1, width, height, score, label."""
    rows = detections.copy()
    rows[:, 3:5] -= rows[:, 1:3]
    return rows


def _reference(dataset: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    result = COCO()
    result.dataset = dataset
    result.createIndex()
    return result


def curves_of(evaluator: Any) -> Curves:
    """The curves of either library's evaluator, accumulated."""
    return Curves(evaluator.eval["precision"], evaluator.eval["recall"], evaluator.eval["scores"])
