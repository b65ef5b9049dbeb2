"""Evaluation reports put into one table: how long it takes, and how much memory.

    python -m bench.index [--folders 1000] [--reports 100]

Reports of 100 classes, as many in each folder; one of a hundred is cut off. The peer reads each with
`Path.read_text` and parses all of it, as this project did before.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import Row, arguments, report
from evaluate import report as reports
from utils.coco_names import METRICS

CLASSES = [f"class number {number}" for number in range(1, 101)]


def text(job: int) -> str:
    """A report as evaluate.run writes it."""
    result = {
        "job": str(job),
        "date": "2030-01-02 03:04:05+00:00",
        "checkpoint": f"runs/chain_{job}/r3/checkpoints/best.pth",
        "sha256": "0" * 64,
        "epoch": 36,
        "images": 20000,
        "classes": CLASSES,
        "architecture": {"num_classes": 101, "backbone": "resnet50"},
        "versions": {"torch": "2.11.0"},
        "stats": {name: (job % 997) / 997 / (number + 1) for number, name in enumerate(METRICS)},
        "per_class": {name: (job % 991) / 991 / (number + 1) for number, name in enumerate(CLASSES)},
    }
    return reports.render(result, "\n".join(f" Average Precision  (AP) @[ line {line} ] = 0.123" for line in range(12)))


def fill(root: Path, folders: int, each: int) -> None:
    for folder in range(folders):
        (root / f"chain_{folder}" / "eval").mkdir(parents=True)
        for number in range(each):
            job = folder * each + number
            content = text(job)
            (root / f"chain_{folder}" / "eval" / f"eval_{job}.out").write_text(
                content[:-50] if job % 100 == 0 else content
            )


def plain(root: str) -> None:
    """The peer, in a process of its own."""
    rows = []
    for file in sorted(Path(root).rglob("eval_*.out")):
        result = reports.parse(file.read_text(errors="replace"), str(file))
        numbers = [f"{result['stats'][name]:.3f}" for name in METRICS] if result else ["no result"]
        rows.append((str(file), *numbers))
    print("\n".join("  ".join(row) for row in rows))


def cost(*command: str) -> tuple[float, float, int]:
    """Wall seconds, MiB of the largest of the processes so far, and lines."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return time.perf_counter() - began, peak, done.stdout.count(b"\n")


def main() -> None:
    given = arguments(__doc__, folders=1000, reports=100)
    count = given.folders * given.reports
    with tempfile.TemporaryDirectory() as root:
        fill(Path(root), given.folders, given.reports)
        ours = cost("-m", "evaluate.report", root)  # first: the peak is that of the largest child
        peer = cost("-c", f"from bench.index import plain; plain({json.dumps(root)})")
    assert ours[2] == count + 1 and peer[2] == count, (ours, peer)
    report(
        "index",
        [
            Row(f"reports in a table: {count:,}", f"{ours[0]:.1f} s", f"{peer[0]:.1f} s", peer[0] / ours[0], 1),
            Row("memory, at most", f"{ours[1]:.0f} MiB", f"{peer[1]:.0f} MiB", peer[1] / ours[1], 1),
        ],
    )


if __name__ == "__main__":
    main()
