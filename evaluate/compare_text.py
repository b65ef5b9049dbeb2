"""The text of a comparison: a run's own numbers, or what differs between two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evaluate import analysis, run_cost
from evaluate.chain_files import StageFiles
from evaluate.detections_file import Evaluated
from utils.coco_names import METRICS, show

SEEDS = "Noise is what other images would change; what other seeds of training would, is not in it."
MOST_CLASSES = 10  # shown, of those whose AP has changed


@dataclass(frozen=True)
class Run:
    word: str  # as it was given
    found: Evaluated
    stages: Sequence[StageFiles]  # that led to it; none for a file alone


def alone(run: Run) -> Iterator[str]:
    """A run's own numbers."""
    yield _data(run)
    intervals = analysis.intervals(run.found)
    rows = [("", "", "95 % interval")]
    for name, value in analysis.stats(run.found).items():
        known = intervals[name]
        rows.append((name, show(value), f"{known.lower:.3f} to {known.upper:.3f}" if known else ""))
    yield from _table(rows)


def against(base: Run, other: Run) -> Iterator[str]:
    """What `other` does better and worse than `base`, on the same data."""
    yield f"{other.word} (B) against {base.word} (A): {_data(other)}"
    before, now = analysis.stats(base.found), analysis.stats(other.found)
    differences = analysis.differences(base.found, other.found)
    rows = [("", "A", "B", "B - A", "95 % interval", "")]
    for name in METRICS:
        known, interval, said = differences[name], "", ""
        if known:
            interval = f"{known.lower:+.3f} to {known.upper:+.3f}"
            said = "beyond noise" if known.is_beyond_noise else "within noise"
        change = "" if before[name] == -1 else f"{now[name] - before[name]:+.3f}"
        rows.append((name, show(before[name]), show(now[name]), change, interval, said))
    yield from _table(rows)
    yield SEEDS
    yield from _classes(base, other)
    for title, lines in (
        ("Configuration, A -> B", run_cost.changes(base.stages, other.stages)),
        ("Cost, A and B", run_cost.costs(base.stages, other.stages)),
    ):
        if lines:
            yield from ("", title, *(f"  {line}" for line in lines))


def _classes(base: Run, other: Run) -> Iterator[str]:
    before, now = analysis.per_class(base.found), analysis.per_class(other.found)
    changed = [name for name in before if before[name] != now[name]]
    changed.sort(key=lambda name: -abs(now[name] - before[name]))
    yield from ("", f"AP of classes, {len(changed)} of {len(before)} changed")
    if changed:
        rows = [
            (f"  {name}", show(before[name]), show(now[name]), f"{now[name] - before[name]:+.3f}")
            for name in changed[:MOST_CLASSES]
        ]
        yield from _table(rows)
    if len(changed) > MOST_CLASSES:
        yield f"  and {len(changed) - MOST_CLASSES} more, by {abs(now[changed[-1]] - before[changed[-1]]):.3f} and more"


def _data(run: Run) -> str:
    found = run.found
    return f"{len(found.ids):,} images of {found.split}, {len(found.boxes):,} boxes of {len(found.classes)} classes"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
