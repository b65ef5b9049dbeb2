"""What the report page says about an evaluation's numbers: all twelve, those of classes, and the curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluate import analysis, chain_files, charts
from evaluate.chain_files import ChainFiles, is_number
from evaluate.detections_file import Evaluated
from utils.coco_names import METRICS, show

NEEDED: dict[str, type] = {"images": int, "epoch": int, "split": str, "data": str, "classes": list, "stats": dict}
HALVES = 12  # classes above which their table is halved
MARKS = {"good": " ▲", "bad": " ▼", "": ""}  # of a change, for who does not see the colours
WHAT = {
    "AP": "precision over recall, IoU .50 to .95",
    "AP50": "at IoU .50: about the right place",
    "AP75": "at IoU .75: a tight box",
    "APs": "objects up to 32² pixels",
    "APm": "objects up to 96² pixels",
    "APl": "larger objects",
    "AR1": "recall with 1 detection an image",
    "AR10": "recall with 10",
    "AR100": "recall with 100",
    "ARs": "recall of objects up to 32² pixels",
    "ARm": "recall of objects up to 96² pixels",
    "ARl": "recall of larger objects",
}


@dataclass(frozen=True)
class Evaluation:
    """The chain's metrics.json, empty without one, and its detections, or why there are none."""

    metrics: Mapping[str, Any]
    found: Evaluated | None
    why: str
    problems: tuple[str, ...] = ()

    @classmethod
    def read(cls, chain: ChainFiles, found: Evaluated | None, why: str) -> Evaluation:
        stage = chain.evaluation
        file: Path | None = stage.run_dir.report_json if stage else None
        if not file or not file.exists():
            return cls({}, found, why)
        try:
            metrics = json.loads(file.read_text())
            sound = isinstance(metrics, dict) and all(isinstance(metrics.get(key), of) for key, of in NEEDED.items())
            numbers = [*metrics["stats"].values(), *metrics["per_class"].values()] if sound else []
            if sound and metrics["stats"].keys() >= set(METRICS) and all(map(is_number, numbers)):
                return cls(metrics, found, why)
            problem = f"{file} is damaged: not the metrics of an evaluation"
        except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
            problem = f"{file} cannot be read: {error}"
        return cls({}, found, why, (problem,))


def results(
    evaluation: Evaluation, status: str, reference: str | None, compared: Mapping[str, float]
) -> dict[str, Any]:
    """The twelve numbers, their intervals, and the change against the reference. Args: status: of the evaluation."""
    if not evaluation.metrics:
        why = evaluation.problems[0] + "." if evaluation.problems else evaluation.why
        return {"missing": why, "rows": []}
    stats, found = evaluation.metrics["stats"], evaluation.found
    intervals = analysis.intervals(found) if found else {}
    bounds = {name: (one.lower, one.upper) for name, one in intervals.items() if one}
    shown = [*(stats[name] for name in METRICS), *compared.values(), *(upper for _, upper in bounds.values())]
    top = max(0.1, math.ceil(max(shown) * 10) / 10)
    rows = [_row(name, stats[name], bounds.get(name), compared.get(name), top) for name in METRICS]
    about = (
        f"Intervals: the images drawn anew again and again (bootstrap over {len(found.ids):,} images), the model as it "
        "is; another training would vary besides."
        if found
        else f"Without intervals. {evaluation.why}"
    )
    if reference:
        about += f" Reference: {reference}; ▲ and ▼: it lies outside of this result's interval."
        about += " Whether it was measured on the same data is not known here; evaluate.compare makes sure."
    else:
        about += " No reference was given (--reference dl-sp22, or the metrics.json of another run)."
    differ = [name for name, one in intervals.items() if one and abs(one.value - stats[name]) > 1e-6]
    warnings = []
    if differ:
        warnings.append(f"metrics.json and detections.npz are of different evaluations: {', '.join(differ)} differ.")
    if status not in ("done", chain_files.BY_HAND):
        warnings.append(f"The evaluation is {status}; these numbers are of the one that was finished last.")
    return {
        "missing": "",
        "warning": " ".join(warnings),
        "images": f"{evaluation.metrics['images']:,}",
        "split": evaluation.metrics["split"],
        "top": f"{top:.1f}",
        "rows": rows,
        "reference": reference,
        "about": about,
    }


def _row(
    name: str, value: float, bound: tuple[float, float] | None, compared: float | None, top: float
) -> dict[str, Any]:
    def at(place: float | None) -> str:
        return "" if place is None or place < 0 else f"{100 * place / top:.2f}%"

    change, sense = "", ""
    if compared is not None and min(compared, value) >= 0:
        outside = bound is not None and not bound[0] <= compared <= bound[1]
        sense = ("good" if value > compared else "bad") if outside else ""
        change = f"{value - compared:+.3f}{MARKS[sense]}"
    return {
        "name": name,
        "what": WHAT[name],
        "value": show(value),
        "has_interval": bound is not None,
        "interval": f"{show(bound[0])} to {show(bound[1])}" if bound else "",
        "low": at(bound[0]) if bound else "",
        "high": at(bound[1]) if bound else "",
        "at": at(value),
        "reference": "" if compared is None else show(compared),
        "reference_at": at(compared),
        "change": change,
        "sense": sense,
    }


def classes(evaluation: Evaluation) -> dict[str, Any]:
    """AP of each class, the best first, those without a box last."""
    if not evaluation.metrics:
        return {"missing": evaluation.why or f"{evaluation.problems[0]}."}
    found = evaluation.found
    counts = np.bincount(found.labels, minlength=len(found.classes) + 1)[1:].tolist() if found else []
    boxes = dict(zip(found.classes, counts, strict=True)) if found else {}
    per_class = sorted(evaluation.metrics["per_class"].items(), key=lambda item: (-item[1], item[0]))
    rows = [
        {
            "name": name,
            "boxes": f"{boxes[name]:,}" if name in boxes else "",
            "value": show(value),
            "width": width(value) if value >= 0 else "",
        }
        for name, value in per_class
    ]
    half = -(-len(rows) // 2) if len(rows) > HALVES else len(rows)
    return {"missing": "", "tables": [part for part in (rows[:half], rows[half:]) if part]}


def curves(evaluation: Evaluation) -> dict[str, Any]:
    """Precision over recall: means over the classes, and each class or, of many, where most of them are."""
    if not evaluation.found:
        return {"missing": evaluation.why}
    found = analysis.curves(evaluation.found)
    measured = found.precision[~np.isnan(found.precision).any(axis=1)]
    if not len(measured):
        return {"missing": "No class has a box in this split: there is nothing to find."}
    means = np.stack(list(found.means.values()))
    count = f"{len(measured):,} classes"
    title, rest = "Precision over recall", [(f"each of the {count}, IoU .50", "--muted", "1")]
    if len(measured) > charts.LINES:
        title += f": means over {count}, and bands that hold the middle half and the middle 90 % of them"
        rest = [(f"the middle half of {count}, IoU .50", "--rule", "10"), ("the middle 90 % of them", "--grid", "10")]
    chart = charts.precision_recall("pr", title, found.recall, means, measured)
    items = [charts.legend(place, f"IoU {name}") for place, name in enumerate(found.means)]
    if len(measured) > 1:
        items += [{"name": name, "colour": colour, "dashes": "", "width": thick} for name, colour, thick in rest]
    return {"missing": "", "chart": chart, "legend": items}


def width(share: float) -> str:
    """Of a bar, as CSS has it."""
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"
