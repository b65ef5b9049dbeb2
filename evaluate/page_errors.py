"""What the report page says about an evaluation's errors: which class is taken for which, and TIDE's kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluate import analysis, tide
from evaluate.page_results import Evaluation, width

MATRIX = 20  # classes whose confusions are shown as a matrix
GREATEST = 20  # confusions of each kind shown of more classes
TOTALS = ("FP", "FN")  # over all kinds
KINDS = {
    "Cls": ("classification", "The box is right, the class is not."),
    "Loc": ("localisation", "The class is right, the box overlaps the object by IoU .10 to .50 only."),
    "Both": ("both", "The wrong class, and a box that overlaps the object by IoU .10 to .50 only."),
    "Dupe": ("duplicate", "The object had been found already, by a detection with a higher score."),
    "Bkg": ("background", "No object is there: IoU below .10 with each."),
    "Miss": ("missed", "Not found, and no classification or localisation error is at this object either."),
    "FP": ("all false detections", "What AP would gain if nothing wrong were detected."),
    "FN": ("all missed objects", "What AP would gain if each object were found."),
}


def confusion(evaluation: Evaluation) -> dict[str, Any]:
    """Which class is taken for which, or for background."""
    if not evaluation.found:
        return {"missing": evaluation.why}
    score = analysis.best_score(evaluation.found)
    counts = analysis.confusion(evaluation.found)
    names = [*evaluation.found.classes, "background"]
    of_truth = counts.sum(axis=1)
    rule = f"IoU .50 or more; only detections from a score of {score:.2f} on count: from there F1 is highest."
    if len(names) - 1 <= MATRIX:
        rows = [
            {"name": names[i], "cells": [_cell(counts, of_truth, i, j) for j in range(len(names))]}
            for i in range(len(names))
        ]
        about = (
            "Boxes of the truth (rows) and the detections at them (columns). Last column: objects that nothing is at. "
            f"Last row: detections where no object is, or one that a detection with a higher score is at. {rule}"
        )
        return {"missing": "", "matrix": rows, "columns": names, "about": about}
    greatest = []
    for name, with_background in (("Between classes", False), ("With background: missed, or not there", True)):
        wrong = counts.copy()
        np.fill_diagonal(wrong, 0)
        of_background = np.zeros(wrong.shape, dtype=bool)
        of_background[-1] = of_background[:, -1] = True
        wrong[of_background != with_background] = 0
        greatest.append({"name": name, "found": _greatest(wrong, of_truth, names)})
    return {"missing": "", "matrix": [], "greatest": greatest, "about": f"The {GREATEST} greatest of each kind. {rule}"}


def _greatest(wrong: np.ndarray, of_truth: np.ndarray, names: Sequence[str]) -> list[dict[str, str]]:
    places = np.argsort(-wrong, axis=None, kind="stable")[:GREATEST]
    return [
        {
            "truth": names[i],
            "detected": names[j],
            "count": f"{int(wrong[i, j]):,}",
            "share": "" if i == len(names) - 1 else f"{wrong[i, j] / of_truth[i]:.0%}",
        }
        for i, j in zip(*np.unravel_index(places, wrong.shape), strict=True)
        if wrong[i, j]
    ]


def _cell(counts: np.ndarray, of_truth: np.ndarray, i: int, j: int) -> dict[str, str]:
    background, count = len(counts) - 1, int(counts[i, j])
    if i == j == background:
        return {"kind": "empty", "count": "", "percent": "", "share": "0"}
    share = count / of_truth[i] if of_truth[i] else 0.0
    kind = "right-class" if i == j else "wrong-class" if count else "empty"
    percent = f"{share:.0%}" if count and i != background else ""
    return {"kind": kind, "count": f"{count:,}", "percent": percent, "share": f"{share:.3f}"}


def kinds(evaluation: Evaluation) -> dict[str, Any]:
    """TIDE's kinds of error, the dearest first; the totals last."""
    if not evaluation.found:
        return {"rows": [], "top": ""}
    found = tide.errors(evaluation.found)
    top = max(0.01, *(cost for cost, _ in found.values()))
    order = sorted(found.items(), key=lambda item: (item[0] in TOTALS, -item[1][0]))
    rows = [
        {
            "name": KINDS[name][0],
            "what": KINDS[name][1],
            "count": "" if count is None else f"{count:,}",
            "cost": f"{cost:.3f}",
            "width": width(cost / top),
        }
        for name, (cost, count) in order
    ]
    return {"rows": rows, "top": f"{top:.2f}"}
