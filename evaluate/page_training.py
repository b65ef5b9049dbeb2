"""The curves of the report page: a training over all of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from evaluate.chain_files import StageFiles, is_number
from evaluate.charts import Round, legend, scores, training
from utils.coco_names import show

SCORES = ("AP", "AP50", "AP75", "recall")  # of validation records; recall is what proposals alone have


def line(place: int, stages: Sequence[StageFiles]) -> dict[str, Any]:
    """The curves of one training, over all of its rounds."""
    names = " → ".join(stage.name for stage in stages)
    rounds = [one for one in (_round(stage, "train", "step", ("loss", "lr")) for stage in stages) if len(one.x)]
    chart, best, keys = Markup(""), "", _scored(stages)
    validated = [one for one in (_round(stage, "val", "epoch", keys) for stage in stages) if len(one.x)]
    if keys and validated:
        chart = scores(f"scores{place}", f"{', '.join(keys)} of {names} over epochs", validated)
        x = np.concatenate([one.x for one in validated])
        y = np.concatenate([one.values[keys[0]] for one in validated])
        if y.max() >= 0:
            best = f"Best {keys[0]} {show(float(y.max()))}, in epoch {int(x[y.argmax()])}, counted from 0."
    count = sum(len(one.x) for one in rounds)
    return {
        "title": names,
        "losses": training(f"training{place}", f"Loss and learning rate of {names} over steps", rounds)
        if rounds
        else "",
        "about": f"Training loss, {count:,} records (pale) and their running median; below, the learning rate.",
        "scores": chart,
        "best": best,
        "legend": [legend(place, key) for place, key in enumerate(keys)],
        "unscored": "" if keys or "data.unlabeled" in stages[0].config else "No validation has been logged yet.",
    }


def _scored(stages: Sequence[StageFiles]) -> list[str]:
    """Those of SCORES that the stages have validated by."""
    records = [record for stage in stages for record in stage.of_kind("val")]
    return [key for key in SCORES if records and all(is_number(record.get(key)) for record in records)]


def _round(stage: StageFiles, kind: str, axis: str, keys: Sequence[str]) -> Round:
    rows = [record for record in stage.of_kind(kind) if all(is_number(record.get(key)) for key in (axis, *keys))]
    columns = {key: np.array([row[key] for row in rows], dtype=float) for key in (axis, *keys)}
    return Round(stage.name, columns.pop(axis), columns)
