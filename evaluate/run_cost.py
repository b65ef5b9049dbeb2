"""What led to a run: its stages' settings and what they cost, beside another run's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from evaluate.chain_files import StageFiles, is_number
from utils import goodput

PLACES = ("run_dir", "resume")  # keys that say where, not what


def changes(before: Sequence[StageFiles], now: Sequence[StageFiles]) -> list[str]:
    """`stage key A -> B` of what is set differently, and the stages that only one has."""
    one, two = (
        {name: stage.config for name, stage in stages.items() if stage.config} for stages in _paired(before, now)
    )
    lines = []
    for name in (*one, *(name for name in two if name not in one)):
        if not (name in one and name in two):
            lines.append(f"{name}: only in {'A' if name in one else 'B'}")
            continue
        mine, theirs = one[name], two[name]
        for key in (*mine, *(key for key in theirs if key not in mine)):
            values = [str(each[key]) if key in each else "not there" for each in (mine, theirs)]
            if key not in PLACES and values[0] != values[1]:
                lines.append(f"{name} {key}  {values[0]} -> {values[1]}")
    return lines


def _paired(before: Sequence[StageFiles], now: Sequence[StageFiles]) -> list[dict[str, StageFiles]]:
    """Those to compare under the same name: two evaluations alone are a pair whatever their folders are called."""
    if len(before) == len(now) == 1:
        name = " and ".join(dict.fromkeys((before[0].name, now[0].name)))
        return [{name: before[0]}, {name: now[0]}]
    return [{stage.name: stage for stage in stages} for stages in (before, now)]


def costs(before: Sequence[StageFiles], now: Sequence[StageFiles]) -> list[str]:
    """Device hours, and images a second of each training stage; none of runs that are a file only."""
    if not (before or now):
        return []
    lines = [f"time      {'; '.join(_hours(stages) for stages in (before, now))}"]
    rates = [{stage.name: rate for stage in stages if (rate := _rate(stage))} for stages in (before, now)]
    for name in (*rates[0], *(name for name in rates[1] if name not in rates[0])):
        shown = [f"{each[name]:,.1f}" if name in each else "n/a" for each in rates]
        lines.append(f"images/s  {name}: {'; '.join(shown)}")
    return lines


def _hours(stages: Sequence[StageFiles]) -> str:
    """The hours of all ranks of all attempts, by device; else the hours the markers tell of."""
    every = [(stage, goodput.stage(stage.run_dir, None)) for stage in stages]
    spent = [each for stage, each in every if stage.marker or stage.records or each.wall]  # of stages that have begun
    if spent and all(each.wall for each in spent):
        devices: dict[str, float] = {}
        for each in spent:
            devices[each.device] = devices.get(each.device, 0.0) + each.rank_seconds / 3600
        return ", ".join(f"{hours:.2f} h of {device}" for device, hours in devices.items())
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    return f"{sum(known) / 3600:.2f} h of the last attempts" if known else "n/a"


def _rate(stage: StageFiles) -> float | None:
    """The median of the records."""
    rates = [record["images_per_s"] for record in stage.of_kind("train") if is_number(record.get("images_per_s"))]
    return statistics.median(rates) if rates else None
