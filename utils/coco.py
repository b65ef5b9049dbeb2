"""COCO's detection metrics (Lin et al., "Microsoft COCO", 2014), exactly those of pycocotools.

A COCO number of -1 means that there is nothing to measure: no ground truth of that class or size.
It stays -1 in every value and is shown as `n/a`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.coco_backends import Curves, Truth, curves, library
from utils.coco_names import METRICS, Evaluator, show
from utils.errors import InputError
from utils.labels import LabelIndex

__all__ = ["COLUMNS", "METRICS", "Evaluator", "Result", "evaluate", "library", "show", "summarize"]

COLUMNS = ("image_id", "x1", "y1", "x2", "y2", "score", "label")  # of a detections array
AREAS = ("all", "small", "medium", "large")  # up to 32^2, up to 96^2 and more square pixels
DETECTIONS = (1, 10, 100)  # of an image that count
IOUS = {"0.50:0.95": slice(None), "0.50": slice(0, 1), "0.75": slice(5, 6)}  # of ten thresholds
# Of each of METRICS: precision or recall, IoU, area, detections.
SUMMARY = (
    *((True, iou, "all", 100) for iou in IOUS),
    *((True, "0.50:0.95", area, 100) for area in AREAS[1:]),
    *((False, "0.50:0.95", "all", detections) for detections in DETECTIONS),
    *((False, "0.50:0.95", area, 100) for area in AREAS[1:]),
)


@dataclass(frozen=True)
class Result:
    """The twelve numbers by name, AP by class name, and the twelve lines as pycocotools prints them."""

    stats: dict[str, float]
    per_class: dict[str, float]
    table: str


def evaluate(index: LabelIndex, detections: np.ndarray, evaluator: Evaluator = "auto") -> Result:
    """Compare detections with the boxes of a split.

    Args:
        index: the split; labels in 1..C.
        detections: (n, 7) float64 rows of `COLUMNS`, boxes in pixels of the original image. Rows of one image
            with equal scores rank in the order given. No rows: every AP and AR is 0.
        evaluator: how long it takes, never what the result is.

    Raises: InputError naming the first row that is not finite, of an unknown image or label, or inverted
        (pycocotools itself gives NaN boxes AP 1.0 and drops unknown labels); or when the evaluator is not installed.
    """
    _check(index, detections)
    truth = Truth(
        ids=index.ids,
        classes=len(index.classes),
        images=np.repeat(index.ids, np.diff(index.offsets)),
        labels=index.labels,
        boxes=index.boxes,
        crowd=np.zeros(len(index.labels), dtype=bool),
    )
    found = curves(evaluator, truth, detections)
    stats, table = summarize(found)
    of_all = found.precision[..., 0, -1]  # (IoU, recall, class); all sizes, 100 detections
    return Result(stats, {name: _mean(of_all[:, :, k]) for k, name in enumerate(index.classes)}, table)


def summarize(found: Curves) -> tuple[dict[str, float], str]:
    """The twelve numbers by name, and the lines that pycocotools prints of them."""
    stats, lines = {}, []
    for name, (is_precision, iou, area, detections) in zip(METRICS, SUMMARY, strict=True):
        values = (found.precision if is_precision else found.recall)[IOUS[iou]]
        stats[name] = _mean(values[..., AREAS.index(area), DETECTIONS.index(detections)])
        title, kind = ("Average Precision", "(AP)") if is_precision else ("Average Recall", "(AR)")
        what = f"IoU={iou:<9} | area={area:>6} | maxDets={detections:>3}"
        lines.append(f" {title:<18} {kind} @[ {what} ] = {stats[name]:0.3f}")
    return stats, "\n".join(lines)


def _mean(values: np.ndarray) -> float:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _check(index: LabelIndex, rows: np.ndarray) -> None:
    assert rows.dtype == np.float64 and rows.shape[1:] == (len(COLUMNS),), (rows.dtype, rows.shape)
    classes = len(index.classes)
    images, labels = rows[:, 0], rows[:, 6]
    known = np.sort(index.ids)  # exact in float64: at most 15 digits
    if not np.isfinite(rows).all():
        finite = np.isfinite(rows).all(axis=1)
        _refuse(index, rows, ~finite, "a value is not finite: the weights or the precision are unusable")
    nearest = known[np.searchsorted(known[:-1], images)]
    _refuse(index, rows, nearest != images, f"no such image id in {index.tree}/{index.split}")
    unknown = (labels < 1) | (labels > classes) | (labels != np.floor(labels))
    _refuse(index, rows, unknown, f"no such label; known: 1..{classes}")
    inverted = (rows[:, 3] < rows[:, 1]) | (rows[:, 4] < rows[:, 2])
    _refuse(index, rows, inverted, "the box is inverted (x2 < x1 or y2 < y1)")


def _refuse(index: LabelIndex, rows: np.ndarray, bad: np.ndarray, reason: str) -> None:
    """Raise InputError about the first of the `bad` rows, if there is one."""
    if not bad.any():
        return
    number = int(bad.argmax())
    values = ", ".join(f"{name} {value:g}" for name, value in zip(COLUMNS, rows[number], strict=True))
    label = rows[number, 6]
    class_name = f" (class {index.classes[int(label) - 1]})" if label in range(1, len(index.classes) + 1) else ""
    raise InputError(f"detection row {number}: {values}{class_name}: {reason}; {bad.sum()} such rows")
