"""Where a chain's time went, as the report page shows it: parts that add up to each stage's wall time."""

from __future__ import annotations

from typing import Any

from evaluate.chain_files import ChainFiles, StageFiles
from utils import goodput
from utils.goodput import Spent

# In the order of the bars, which is that of the colours in style.css.
PARTS = (
    "compute",
    "validation",
    "evaluation",
    "data wait",
    "saving",
    "labels",
    "staging",
    "start-up",
    "queue",
    "between attempts",
    "redone",
)


def time(chain: ChainFiles) -> dict[str, Any]:
    """The parts of each stage's wall time, which add up to it."""
    every = {stage.name: goodput.stage(stage.run_dir, stage.could_run) for stage in chain.stages}
    spent = {name: one for name, one in every.items() if one.seconds and one.wall > 0}
    if not spent:
        return {
            "missing": "No stage of this chain has recorded what its time went to: it was run before that was kept."
        }
    used = [part for part in PARTS if any(part in one.seconds for one in spent.values())]
    rows, walls = [], [one.wall for one in spent.values()]
    for part in used:
        parts = [one.seconds.get(part, 0.0) for one in spent.values()]
        cells = [clock(value) if value else "" for value in [*parts, sum(parts)]]
        rows.append({"name": part, "cells": [*cells, f"{sum(parts) / sum(walls):.1%}"]})
    unknown = [name for name in every if name not in spent]
    return {
        "missing": "",
        "stages": [_bar(name, one) for name, one in spent.items()],
        "legend": [{"name": part, "number": PARTS.index(part)} for part in used],
        "rows": rows,
        "sums": [*(clock(sum(one.seconds.values())) for one in spent.values()), clock(sum(walls)), "100.0%"],
        "advice": [
            {"stage": stage.name, "text": _advice(stage, spent[stage.name])}
            for stage in chain.stages
            if stage.name in spent
        ],
        "problems": [f"{name}: {problem}" for name, one in spent.items() for problem in one.problems],
        "unknown": f"Not recorded: {', '.join(unknown)}." if unknown else "",
    }


def _advice(stage: StageFiles, spent: Spent) -> str:
    try:
        return goodput.advice(spent, stage.nested)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # keys of another version, or none
        return f"no advice, the configuration is not one of this version: {type(error).__name__}: {error}"


def _bar(name: str, spent: Spent) -> dict[str, Any]:
    shares = [(part, spent.seconds[part] / spent.wall) for part in PARTS if part in spent.seconds]
    ranks = "1 process" if spent.world_size == 1 else f"{spent.world_size} processes"
    restarts = f", {spent.restarts} restart{'s' if spent.restarts > 1 else ''}" if spent.restarts else ""
    return {
        "name": name,
        "wall": duration(spent.wall),
        "where": f"{ranks}, {spent.device}{restarts}",
        "parts": [{"number": PARTS.index(part), "width": f"{100 * share:.3f}%"} for part, share in shares],
        "label": f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares),
    }


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 5 min`, `12 min 3 s` or `8 s`."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = round(seconds), list[str]()
    for name, size in units:
        if left >= size or parts:
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2]) if parts else f"{seconds:.1f} s"


def clock(seconds: float) -> str:
    """`1:02:03` for hours, minutes and seconds; below a minute `3.4 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
