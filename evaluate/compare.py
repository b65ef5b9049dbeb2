"""Runs compared by what they found on the same images: differences with their intervals, settings, cost.

    python -m evaluate.compare runs/a runs/b ...             the first is what the others are compared with
    python -m evaluate.compare runs/a --fail-under AP50=0.4 --fail-if-worse-than runs/before

RUN is a chain's directory, an evaluation's, or a detections.npz. A difference is beyond noise when its 95 % interval, a
paired bootstrap over images, leaves out 0. It says that other images would show it too; another seed of the training
is another question. The --fail options hold for every run but the first, or for a single one; exit code 5.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluate import analysis, chain_files, compare_text, detections_file
from evaluate.bootstrap import FEWEST
from evaluate.compare_text import Run
from utils.coco_names import METRICS, show
from utils.errors import CheckFailed, InputError, cli
from utils.paths import RunDir


def load(word: str) -> Run:
    """A run by its chain's directory, its evaluation's, or its file. Raises: InputError when it has no detections."""
    path = Path(word)
    if not path.exists():
        raise InputError(f"{word}: no such chain, evaluation or detections file")
    if not path.is_dir() and path.suffix != ".npz":
        raise InputError(f"{word}: give the directory of a chain or of an evaluation, or its detections.npz")
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


def check(run: Run, limits: Sequence[tuple[str, float]], better: Run | None) -> str:
    """What holds. Raises: CheckFailed when a number is under its limit, or AP below that of `better` beyond noise."""
    found = analysis.stats(run.found)
    holds = [f"{name} is {show(found[name])}, not under {limit:g}" for name, limit in limits]
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
        holds.append(f"AP is not worse than that of {better.word} beyond noise: {difference.value:+.3f}")
    return f"{run.word}: {'; '.join(holds)}"


def _limit(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    if name not in METRICS:
        raise argparse.ArgumentTypeError(f"{word!r}: one of {', '.join(METRICS)}, as AP50=0.4")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):  # nothing is under NaN: the check would never fail
        raise argparse.ArgumentTypeError(f"{word!r}: a finite number after {name}=")
    return name, limit


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
        print(*compare_text.alone(runs[0]), sep="\n")
    for number, run in enumerate(runs[1:]):
        check_same(runs[0], run)
        print(*([""] if number else []), *compare_text.against(runs[0], run), sep="\n")
    for run in runs[1:] or runs:
        holds = check(run, given.fail_under, better)
        if given.fail_under or better:
            print(holds)


if __name__ == "__main__":
    cli(main)
