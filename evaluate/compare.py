"""Runs compared by what they found on the same images: differences with their intervals, settings, cost.

    python -m evaluate.compare runs/a runs/b ...             the first is what the others are compared with
    python -m evaluate.compare runs/a --fail-under AP50=0.4 --fail-if-worse-than runs/before

RUN is a chain's directory, an evaluation's, or a detections.npz. A difference is beyond noise when its 95 % interval, a
paired bootstrap over images, leaves out 0. It says that other images would show it too; another seed of the training
is another question. The --fail options hold for every run but the first, or for a single one; exit code 5.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluate import analysis, chain_files, detections_file, run_cost
from evaluate.bootstrap import FEWEST
from evaluate.chain_files import StageFiles
from evaluate.detections_file import Evaluated
from utils.coco_names import METRICS, show
from utils.errors import CheckFailed, InputError, cli
from utils.paths import RunDir

MOST_CLASSES = 10  # shown, of those whose AP has changed


@dataclass(frozen=True)
class Run:
    word: str  # as it was given
    found: Evaluated
    stages: Sequence[StageFiles]  # that led to it; none for a file alone


def load(word: str) -> Run:
    """A run by its chain's directory, its evaluation's, or its file. Raises: InputError when it has no detections."""
    path = Path(word)
    if not path.is_dir():
        return Run(word, detections_file.load(path), ())
    stage = RunDir(path.resolve())
    if stage.detections.exists():
        stages = [one for one in chain_files.read(stage.path.parent).stages if one.name == stage.path.name]
        return Run(word, detections_file.load(stage.detections), stages)
    chain = chain_files.read(path)
    if chain.evaluation is None:
        raise InputError(f"{word}: no evaluation in it yet")
    return Run(word, detections_file.load(chain.evaluation.run_dir.detections), chain.stages)


def check_same(base: Run, other: Run) -> None:
    """Raises: InputError saying what differs unless both were evaluated on the same images, boxes and classes."""
    one, two = base.found, other.found
    if one.classes != two.classes:
        differ = ", ".join(sorted({*one.classes} ^ {*two.classes})) or "in another order"
        problem = f"classes: {len(one.classes)} and {len(two.classes)}, different: {differ}"
    elif not np.array_equal(one.ids, two.ids):
        shared = len(np.intersect1d(one.ids, two.ids))
        problem = f"images: {len(one.ids)} of {one.split} and {len(two.ids)} of {two.split}, {shared} of them in both"
    elif not np.array_equal(one.offsets, two.offsets):
        image = one.names[np.diff(one.offsets) != np.diff(two.offsets)][0]
        problem = f"boxes: {len(one.boxes)} and {len(two.boxes)}; first in {image}"
    elif (wrong := (one.boxes != two.boxes).any(axis=1) | (one.labels != two.labels)).any():
        image = one.names[np.searchsorted(one.offsets, wrong.argmax(), "right") - 1]
        problem = f"boxes: {wrong.sum()} of {len(wrong)} have moved or have another class; first in {image}"
    else:
        return
    raise InputError(f"{base.word} and {other.word} were not evaluated on the same data; {problem}")


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
    """What `other` does better and worse than `base`. Raises: InputError when their data differ."""
    check_same(base, other)
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


def check(run: Run, limits: Sequence[tuple[str, float]], better: Run | None) -> None:
    """Raises: CheckFailed when a number is under its limit, or AP below that of `better` beyond noise."""
    found = analysis.stats(run.found)
    for name, limit in limits:
        if found[name] < limit:
            raise CheckFailed(f"{run.word}: {name} is {show(found[name])}, under {limit:g}")
    if better:
        check_same(better, run)
        difference = analysis.differences(better.found, run.found)["AP"]
        if difference is None:
            raise InputError(f"{run.word}: boxes in fewer than {FEWEST} images: too few to tell it from {better.word}")
        if difference.upper < 0:
            interval = f"95 % interval {difference.lower:+.3f} to {difference.upper:+.3f}"
            raise CheckFailed(
                f"{run.word}: AP is worse than that of {better.word}: {difference.value:+.3f}, {interval}"
            )


def _limit(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    if name not in METRICS:
        raise argparse.ArgumentTypeError(f"{word!r}: one of {', '.join(METRICS)}, as AP50=0.4")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r}: a number after {name}=") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a chain, an evaluation, or a detections.npz")
    parser.add_argument("--fail-under", action="append", type=_limit, default=[], metavar="NAME=NUMBER")
    parser.add_argument("--fail-if-worse-than", metavar="RUN", help="in AP, beyond noise")
    given = parser.parse_args(argv)
    runs = [load(word) for word in given.runs]
    better = load(given.fail_if_worse_than) if given.fail_if_worse_than else None
    if len(runs) == 1:
        print(*alone(runs[0]), sep="\n")
    for number, run in enumerate(runs[1:]):
        print(*([""] if number else []), *against(runs[0], run), sep="\n")
    for run in runs[1:] or runs:
        check(run, given.fail_under, better)


if __name__ == "__main__":
    cli(main)
