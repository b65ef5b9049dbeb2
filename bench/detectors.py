"""AP50 of the three detectors after the same time of training on the CPU, each by its own program.

    python -m bench.detectors [ARCHIVE] [--epochs 2]

ResNet-18 with random weights at 320 pixels, one thread, the small configurations, on generated pictures unless a
labelled archive is given. Faster R-CNN trains for so many epochs; the others for as much CPU time, program start and
validations included, as short runs before predict.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.measure import Row, cpu, report, seconds
from utils import checkpoint_files, metrics
from utils.paths import ROOT, RunDir
from utils.sample_data import LABELED, Sample, make

ROUNDS, PARTS = ROOT / "detect_train/configs/small_r1.yaml", ROOT / "detect_train/two_stage/configs"
ALIKE = ["batch_size=4", "device=cpu", "workers=0", "checkpoint.every_minutes=0"]
DENSE = ["model.head=dense", "model.max_size=320", "optim.lr=0.01"]
ONCE = ["iterations.pre=0", "validate_every=1000"]
SAMPLE = Sample(unlabeled=1, training=160, validation=40, size=320)


class Found(NamedTuple):
    ap50: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.ap50:.3f} after {self.seconds / 60:.1f} min"


class Stage:
    """One program's training, for a share of a detector's time."""

    def __init__(self, module: str, config: Path, *words: str) -> None:
        self.argv = ["-m", module, "--config", str(config), *ALIKE, *words]
        self.counted = "iterations.main" if "two_stage" in module else "epochs"

    def run(self, directory: Path, archive: Path, count: int, *words: str) -> float:
        """CPU seconds of training into `directory`."""
        given = ["--run-dir", str(directory), "--dataset-root", str(archive), f"{self.counted}={count}", *words]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, *self.argv, *given]
        return seconds(lambda: subprocess.run(command, cwd=ROOT, env=environ, stdout=sys.stderr, check=True), cpu)

    def fitting(self, directory: Path, archive: Path, share: float, *words: str) -> int:
        """How many epochs or iterations take `share` seconds."""
        if self.counted == "epochs":  # each has its validation
            return max(1, round(share / self.run(directory / "one", archive, 1, *words)))
        few, more = 5, 25
        begun = self.run(directory / "few", archive, few, *words)
        each = (self.run(directory / "more", archive, more, *words) - begun) / (more - few)
        return max(1, round(few + (share - begun) / each))


def trained(stages: Sequence[Stage], archive: Path, directory: Path, time: float) -> Found:
    """A detector whose stages share `time` seconds."""
    words: list[str] = []
    used = 0.0
    for number, stage in enumerate(stages):
        place = directory / str(number)
        used += stage.run(place, archive, stage.fitting(place, archive, time / len(stages), *words), *words)
        words = [f"unet={checkpoint_files.newest(RunDir(place).checkpoints)}"]
    return Found(metrics.newest(RunDir(place).metrics)["AP50"], used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", nargs="?", type=Path, help="labelled; default: generated pictures")
    parser.add_argument("--epochs", type=int, default=2, help="of Faster R-CNN; default: %(default)s")
    asked = parser.parse_args()
    two_stage = "detect_train.two_stage.train"
    others = {
        "U-Net + ResNet": [Stage(two_stage, PARTS / f"small_{part}.yaml", *ONCE) for part in ("unet", "classify")],
        "dense": [Stage("detect_train.train", ROUNDS, *DENSE)],
    }
    with tempfile.TemporaryDirectory() as folder:
        archive = asked.archive.resolve() if asked.archive else Path(folder) / LABELED
        if not asked.archive:
            make(Path(folder), SAMPLE)
        run = Path(folder) / "peer"
        took = Stage("detect_train.train", ROUNDS).run(run, archive, asked.epochs)
        peer = Found(metrics.newest(RunDir(run).metrics)["AP50"], took)
        print(f"Faster R-CNN-FPN: {peer}", file=sys.stderr)
        found = {}
        for name, stages in others.items():
            found[name] = trained(stages, archive, Path(folder) / str(len(stages)), took)
            print(f"{name}: {found[name]}", file=sys.stderr)
    rows = [Row(name, str(each), str(peer), each.ap50 / peer.ap50 if peer.ap50 else 0) for name, each in found.items()]
    report(f"AP50 on {archive.name} after the same time, beside Faster R-CNN-FPN", rows)


if __name__ == "__main__":
    main()
