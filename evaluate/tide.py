"""The kinds of error and what they cost, as TIDE defines them (Bolya et al., 2020, arXiv:2008.08115)."""

from __future__ import annotations

import numpy as np

from evaluate import analysis
from evaluate.detections_file import Evaluated
from evaluate.matching import overlapping

BACKGROUND = 0.1  # IoU with every box below which a detection is of nothing


def errors(evaluated: Evaluated) -> dict[str, tuple[float, int | None]]:
    """By TIDE's names of the kinds of error, how much AP50 each costs and how many there are.

    FP and FN are what all that is wrong, and all that is missed, cost together; they are not counted.
    """
    found = analysis.evaluator(evaluated).tide_errors(pos_thr=analysis.IOU, bg_thr=BACKGROUND)
    costs = found["delta_ap"]
    # hotcoco keeps classes without any detection in its mean; with their objects gone they leave TIDE's
    present = np.unique(evaluated.labels)
    never = np.setdiff1d(present, evaluated.detections[:, 6].astype(np.int64))
    touched = np.intersect1d(never, evaluated.labels[_covered(evaluated, never)])
    for name, gone in (("Miss", len(never) - len(touched)), ("FN", len(never))):
        if left := len(present) - gone:
            costs[name] = (found["ap_base"] + costs[name]) * len(present) / left - found["ap_base"]
    return {name: (cost, found["counts"].get(name)) for name, cost in costs.items()}


def _covered(evaluated: Evaluated, classes: np.ndarray) -> np.ndarray:
    """The boxes of `classes`, none of which is detected anywhere, at which there is a classification error."""
    box_ids = np.repeat(evaluated.ids, np.diff(evaluated.offsets))
    images = np.unique(box_ids[np.isin(evaluated.labels, classes)])  # of many, few have such boxes
    rows = evaluated.detections
    wrong = rows[(analysis.matches(evaluated) < 0) & np.isin(rows[:, 0], images)]
    pairs = overlapping(wrong[:, 1:5], wrong[:, 0].astype(np.int64), evaluated.boxes, box_ids, BACKGROUND)
    alike = wrong[pairs.detections, 6] == evaluated.labels[pairs.boxes]
    badly_placed = pairs.detections[alike & (pairs.ious <= analysis.IOU)]
    well_placed = pairs.detections[alike & (pairs.ious > analysis.IOU)]
    located = np.setdiff1d(badly_placed, well_placed)  # its greatest IoU with an object of its class is too small
    order = np.lexsort((-pairs.ious, pairs.detections))
    others = order[~alike[order] & ~np.isin(pairs.detections[order], located)]
    _, first = np.unique(pairs.detections[others], return_index=True)
    nearest = others[first]
    nearest = nearest[pairs.ious[nearest] >= analysis.IOU]
    boxes = pairs.boxes[nearest]
    return boxes[np.isin(evaluated.labels[boxes], classes)]
