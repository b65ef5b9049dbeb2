"""What the report page says about a run: its data and its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.chain_files import ChainFiles, StageFiles, is_number
from evaluate.detections_file import Evaluated
from evaluate.matching import AREAS
from evaluate.run_cost import PLACES
from utils import array_file, attempts
from utils.errors import InputError
from utils.files import read_sha256
from utils.paths import RunDir

LISTED = 20  # problems of the data shown


def data(chain: ChainFiles, metrics: Mapping[str, Any], found: Evaluated | None) -> dict[str, Any]:
    """What was read, how much of it, and what was left out."""
    rows = []
    for key in ("data.unlabeled", "data.labeled"):
        sources = {str(stage.config[key]): stage.name for stage in reversed(chain.stages) if stage.config.get(key)}
        rows += [(key, f"{source} (from {stage} on)") for source, stage in sorted(sources.items())]
    for file in sorted(chain.path.glob("archives/*.sha256")):
        rows.append((f"sha256 of {file.stem}", _sha256(file)))
    splits, skipped = [], []
    for split in ("training", "validation"):
        if index := _index(RunDir(chain.path / "eval").label_index(split)):
            splits.append(_split(split, index["offsets"], index["boxes"], f"{len(index['problems']):,}"))
            skipped += index["problems"]
    if found and found.split not in [row["name"] for row in splits]:
        count = metrics.get("skipped")
        splits.append(_split(found.split, found.offsets, found.boxes, f"{count:,}" if is_number(count) else ""))
    about = (
        "Small: up to 32² pixels; medium: up to 96². " if splits else "The counts of images and boxes are not kept. "
    )
    if skipped:
        about += f"{len(skipped):,} images, labels or boxes were left out as unusable."
    elif splits:
        about += "Nothing was left out."
    more = f"and {len(skipped) - LISTED:,} more" if len(skipped) > LISTED else ""
    return {"rows": rows, "splits": splits, "about": about, "skipped": skipped[:LISTED], "more": more}


def _sha256(file: Path) -> str:
    try:
        return read_sha256(file) or ""
    except (InputError, OSError) as error:
        return str(error)


def configuration(chain: ChainFiles, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What made the result, what differs between rounds of one training, and every key of every stage."""
    versions = metrics.get("versions")
    told = {
        "checkpoint": metrics.get("checkpoint"),
        "sha256 of the checkpoint": metrics.get("sha256"),
        "exact": metrics.get("exact"),
        "times resumed": metrics.get("resumes"),
        "evaluated on": _joined(metrics, ("device", "world_size", "precision", "evaluator")),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items())
        if isinstance(versions, dict)
        else versions,
        "git commit": _commits(chain),
        "evaluated": metrics.get("date"),
    }
    lines = [line for line in chain.lines if len(line) > 1]
    return {
        "made_with": [(name, "not recorded" if value in (None, "") else str(value)) for name, value in told.items()],
        "differences": [table for line in lines if (table := _settings(line, differing=True))["rows"]],
        "all": _settings([stage for stage in chain.stages if stage.config], differing=False),
    }


def _commits(chain: ChainFiles) -> str:
    """The code of the whole chain; of which stages, where they are not of one."""
    stages: dict[str, list[str]] = {}
    for stage in chain.stages:
        for commit in dict.fromkeys(attempt.commit or "not known" for attempt in attempts.read(stage.run_dir)[0]):
            stages.setdefault(commit, []).append(stage.name)
    if len(stages) == 1:
        return next(iter(stages))
    return "; ".join(f"{commit} ({', '.join(names)})" for commit, names in stages.items())


def _joined(metrics: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {metrics[key]}" for key in keys if key in metrics)


def _settings(stages: Sequence[StageFiles], differing: bool) -> dict[str, Any]:
    keys = list(dict.fromkeys(key for stage in stages for key in stage.config))
    rows = []
    for key in keys:
        values = [_plain(stage.config[key]) if key in stage.config else "" for stage in stages]
        if not differing or (len(set(values)) > 1 and key not in PLACES):
            rows.append({"key": key, "cells": values})
    return {"stages": [stage.name for stage in stages], "rows": rows}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _index(file: Path) -> dict[str, Any] | None:
    """A label index that the chain's stages left; None without a sound one."""
    try:
        with open(file, "rb") as content:
            content.readline()
            key = json.loads(content.readline(1 << 26))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    index = array_file.load(file, key)
    return index if index and {"offsets", "boxes", "problems"} <= index.keys() else None


def _split(name: str, offsets: np.ndarray, boxes: np.ndarray, left_out: str) -> dict[str, Any]:
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    small, large = int((areas <= AREAS[1][1]).sum()), int((areas > AREAS[2][1]).sum())
    empty = int((np.diff(offsets) == 0).sum())
    counts = (len(offsets) - 1, empty, len(boxes), small, len(boxes) - small - large, large)
    return {"name": name, "cells": [*(f"{count:,}" for count in counts), left_out]}


def last_part(source: str) -> str:
    """The file's name of a path or URL."""
    return source.rstrip("/").rpartition("/")[2]
