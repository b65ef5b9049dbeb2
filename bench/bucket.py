"""Pretraining from a bucket: what is fetched beside what is stored there, and the time beside local files.

    python -m bench.bucket [--images 600] [--epochs 3]

Two loader processes and an empty cache. The storage is the tests' emulator on loopback; where it says so, a fifth of
its answers to reads are 503.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.measure import Row, arguments, report, seconds, wall
from tests.gcs_server import Fault, Server
from utils.paths import ROOT
from utils.sample_data import UNLABELED, Sample, make
from utils.squashfs import unpack

SMALL = [
    "model.arch=resnet18", "model.queue=64", "augment.image_size=32", "batch_size=32", "workers=2", "device=cpu",
]  # fmt: skip
FAILING = Fault("read", status=503, share=0.2)


def pretrained(source: object, run: Path, epochs: int, **environ: str) -> float:
    """Seconds of wall time of the whole program. Raises: CalledProcessError."""
    words = [f"--run-dir={run}", f"--dataset-root={source}", f"--epochs={epochs}", *SMALL]
    command = [sys.executable, "-m", "ssl_train.train", *words]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    return seconds(lambda: subprocess.run(command, cwd=ROOT, env=environ, stdout=sys.stderr, check=True), wall)


def fetched(what: str, name: str, source: Path, stored: dict[str, bytes], gcs: Server, epochs: int) -> list[Row]:
    """Rows of a run from the objects `stored` by their names, below `name`, whose local files are `source`."""
    size = sum(map(len, stored.values()))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        local = pretrained(source, Path(folder) / "local/run", epochs)
        for number, (how, faults) in enumerate((("", []), (", 20 % of the answers 503", [FAILING]))):
            gcs.requests, gcs.faults = [], faults
            run = Path(folder) / f"{number}/run"  # the cache is beside it
            took = pretrained(f"gs://bucket/{name}", run, epochs, STORAGE_EMULATOR_HOST=gcs.host)
            read = [one for one in gcs.requests if one.kind == "read" and one.name in stored]
            good = [one.bytes for one in read if one.status < 300]
            ours = f"{sum(good) / 1e6:.2f} MB, {len(good)} reads, {len(read) - len(good)} failed"
            peer = f"{size / 1e6:.2f} MB in {len(stored)} objects"
            rows.append(Row(f"{what}{how}", ours, peer, size / sum(good), 0.98))
            rows.append(Row("  whole run, beside local files", f"{took:.1f} s", f"{local:.1f} s", local / took))
    return rows


def main() -> None:
    asked = arguments(__doc__, images=600, epochs=3)
    with tempfile.TemporaryDirectory() as folder, Server() as gcs:
        make(Path(folder), Sample(unlabeled=asked.images, training=1, validation=1, size=96))
        archive = Path(folder) / UNLABELED
        images = unpack(archive, Path(folder) / "images")
        objects = {f"images/{file.relative_to(images)}": file.read_bytes() for file in images.rglob("*.*")}
        archives = {archive.name: archive.read_bytes()}
        for name, content in {**objects, **archives}.items():
            gcs.put(name, content)
        rows = fetched("an object an image", "images", images, objects, gcs, asked.epochs)
        rows += fetched("an archive", archive.name, archive, archives, gcs, asked.epochs)
    report(f"{asked.epochs} epochs of {asked.images} images from a bucket, 2 loader processes", rows)


if __name__ == "__main__":
    main()
