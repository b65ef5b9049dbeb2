"""COCO's detection metrics, computed by pycocotools (Lin et al., "Microsoft COCO", 2014).

A COCO number of -1 means that there is nothing to measure: no ground truth of that class or size.
It stays -1 in every value and is shown as `n/a`.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.errors import InputError
from utils.labels import LabelIndex

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
COLUMNS = ("image_id", "x1", "y1", "x2", "y2", "score", "label")  # of a detections array


@dataclass(frozen=True)
class Result:
    """The twelve numbers by name, AP by class name, and the twelve lines as pycocotools prints them."""

    stats: dict[str, float]
    per_class: dict[str, float]
    table: str


def evaluate(index: LabelIndex, detections: np.ndarray) -> Result:
    """Compare detections with the boxes of a split.

    Args:
        index: the split; labels in 1..C.
        detections: (n, 7) float64 rows of `COLUMNS`, boxes in pixels of the original image. Rows of one image
            with equal scores rank in the order given. No rows: every AP and AR is 0.

    Raises: InputError naming the first row that is not finite, of an unknown image or label, or inverted.
        (pycocotools itself gives NaN boxes AP 1.0 and drops unknown labels.)
    """
    _check(index, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _ground_truth(index)
        evaluator = COCOeval(truth, _results(truth, detections), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class); all sizes, 100 detections
    return Result(
        stats=dict(zip(METRICS, evaluator.stats.tolist(), strict=True)),
        per_class={name: _mean(precision[:, :, k]) for k, name in enumerate(index.classes)},
        table=printed.getvalue().rstrip("\n"),
    )


def show(value: float) -> str:
    """A COCO number for a table: three decimals, or `n/a`."""
    return "n/a" if value == -1 else f"{value:.3f}"


def _check(index: LabelIndex, rows: np.ndarray) -> None:
    assert rows.dtype == np.float64 and rows.shape[1:] == (len(COLUMNS),), (rows.dtype, rows.shape)
    classes = len(index.classes)
    faults = (
        (~np.isfinite(rows).all(axis=1), "a value is not finite: the weights or the precision are unusable"),
        (~np.isin(rows[:, 0], index.ids), f"no such image id in {index.root}/{index.split}"),
        (~np.isin(rows[:, 6], np.arange(1, classes + 1)), f"no such label; known: 1..{classes}"),
        ((rows[:, 3] < rows[:, 1]) | (rows[:, 4] < rows[:, 2]), "the box is inverted (x2 < x1 or y2 < y1)"),
    )
    for bad, reason in faults:
        if bad.any():
            number = int(bad.argmax())
            values = ", ".join(f"{name} {value:g}" for name, value in zip(COLUMNS, rows[number], strict=True))
            label = rows[number, 6]
            class_name = f" (class {index.classes[int(label) - 1]})" if label in range(1, classes + 1) else ""
            raise InputError(f"detection row {number}: {values}{class_name}: {reason}; {bad.sum()} such rows")


def _ground_truth(index: LabelIndex) -> COCO:
    """The split as a COCO object, straight from the index: no image or label file is read again."""
    sizes = index.boxes[:, 2:] - index.boxes[:, :2]
    images = np.repeat(index.ids, np.diff(index.offsets))
    columns = (images.tolist(), index.labels.tolist(), index.boxes[:, :2].tolist(), sizes.tolist())
    annotations = [
        {
            "id": number,  # from 1: pycocotools takes a match with annotation 0 for none
            "image_id": image,
            "category_id": label,
            "bbox": corner + size,
            "area": size[0] * size[1],
            "iscrowd": 0,
        }
        for number, (image, label, corner, size) in enumerate(zip(*columns, strict=True), start=1)
    ]
    return _coco(
        {
            "images": [{"id": image} for image in index.ids.tolist()],
            "categories": [{"id": label, "name": name} for label, name in enumerate(index.classes, start=1)],
            "annotations": annotations,
        }
    )


def _results(truth: COCO, detections: np.ndarray) -> COCO:
    if len(detections) == 0:  # loadRes fails on none
        return _coco({**truth.dataset, "annotations": []})
    rows = detections.copy()
    rows[:, 3:5] -= rows[:, 1:3]
    return truth.loadRes(rows)


def _coco(dataset: dict[str, Any]) -> COCO:
    result = COCO()
    result.dataset = dataset
    result.createIndex()
    return result


def _mean(precision: np.ndarray) -> float:
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else -1.0
