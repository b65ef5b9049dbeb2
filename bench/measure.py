"""Two ways of doing the same, measured side by side in one run.

Rounds alternate between them and the ratio is formed within a round, so that a neighbour's load is felt by both.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

Clock = Callable[[], float]
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "pycocotools", "hotcoco", "PyYAML")


def cpu() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


wall: Clock = time.perf_counter


@dataclass(frozen=True)
class Row:
    """One claim. `ratio` says how many times better ours is; `goal` is the least it may be, None: no limit."""

    claim: str
    ours: str  # each with its unit
    peer: str
    ratio: float
    goal: float | None = None

    @property
    def holds(self) -> bool:
        return self.goal is None or self.ratio >= self.goal


def seconds(work: Callable[[], object], clock: Clock) -> float:
    began = clock()
    work()
    return clock() - began


def race(
    ours: Callable[[], object], peer: Callable[[], object], *, rounds: int = 5, clock: Clock = cpu
) -> tuple[float, float, float]:
    """Median seconds of ours and of the peer, and the median over rounds of peer / ours. One more round warms up."""
    ours()
    peer()
    pairs = [(seconds(ours, clock), seconds(peer, clock)) for _ in range(rounds)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return mine, theirs, statistics.median(b / a for a, b in pairs)


def rates(
    claim: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    items: int,
    unit: str,
    goal: float | None = None,
    rounds: int = 5,
    clock: Clock = cpu,
) -> Row:
    """A row of rates: each call of `ours` and of `peer` does `items` of `unit`."""
    mine, theirs, ratio = race(ours, peer, rounds=rounds, clock=clock)
    return Row(claim, f"{items / mine:,.0f} {unit}/s", f"{items / theirs:,.0f} {unit}/s", ratio, goal)


def machine() -> str:
    """What the figures depend on, in a line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    return f"{datetime.date.today()}, {model}, {cores} cores, Python {platform.python_version()}, {versions}"


def report(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table, and end with exit code 1 if one is below its goal."""
    head = ("", "ours", "peer", "ratio", "goal")
    body = [
        (row.claim, row.ours, row.peer, f"{row.ratio:.3g}", "" if row.goal is None else f"{row.goal:g}") for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    print(f"## {title}\n{machine()}\n")
    for line, mark in zip((head, *body), ("", *("" if row.holds else "  MISSED" for row in rows)), strict=True):
        print("  ".join(map(str.ljust, line, widths)).rstrip() + mark)
    print(flush=True)
    if not all(row.holds for row in rows):
        sys.exit(1)


def arguments(doc: str | None, **numbers: int) -> argparse.Namespace:
    """A command line of whole numbers with their defaults, `--images 256`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    return parser.parse_args()
