"""Generated demo data: two squashfs archives in the layout the stages read, drawn in a few seconds.

    python -m utils.sample_data DEST [--unlabeled 320 --training 160 --validation 40 --size 128 --seed 0]

writes
    DEST/unlabeled.sqsh   unlabeled/0.PNG ... N-1.PNG, for pretraining
    DEST/labeled.sqsh     labeled/{training,validation}/images/<id>.JPEG and labels/<id>.yml
    DEST/sample.json      the parameters and the archives' hashes: a second run with the same does nothing

Training ids count from 1, validation ids from 30001. A label file holds `bboxes` [[xmin, ymin, xmax, ymax]]
in pixels, `image_size` [width, height] and `labels`, one class name per box. One training image in twenty is
empty. The same parameters give the same pixels on one machine, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from utils.errors import EnvironmentProblem, InputError, cli
from utils.files import sha256, write_json
from utils.sample_scenes import scene

UNLABELED, LABELED, MANIFEST = "unlabeled.sqsh", "labeled.sqsh", "sample.json"
FIRST_ID = {"training": 1, "validation": 30001}
EMPTY_EVERY = 20  # every so many training images one has no object, as real sets have
SHORT = 0.8  # the shorter side of a labeled picture that is not square, as a share of the longer one
CLOSER = 0.6  # an unlabeled picture's side as a share of a labeled one's: a crop around an object or two


@dataclasses.dataclass(frozen=True)
class Sample:
    """How much to draw: pictures per split, the longer side of a labeled one in pixels, and the seed."""

    unlabeled: int = 320
    training: int = 160
    validation: int = 40
    size: int = 128
    seed: int = 0

    def problems(self) -> list[str]:
        counts = {"unlabeled": self.unlabeled, "training": self.training, "validation": self.validation}
        found = [f"{name} = {count}: must be at least 1" for name, count in counts.items() if count < 1]
        if self.size < 64:
            found.append(f"size = {self.size}: must be at least 64 pixels, or the objects are specks")
        if self.seed < 0:
            found.append(f"seed = {self.seed}: must not be negative")
        return found


def draw_unlabeled(top: Path, sample: Sample, number: int) -> None:
    """Draw `top`/`number`.PNG."""
    rng = np.random.default_rng([sample.seed, 0, number])
    side = round(sample.size * CLOSER)
    picture, _, _ = scene(rng, side, side, int(rng.integers(1, 4)), sizes=(0.18, 0.4))
    picture.save(top / f"{number}.PNG", compress_level=1)


def draw_labeled(top: Path, sample: Sample, split: str, number: int) -> None:
    """Draw `top`/`split`/images/<id>.JPEG and its label file."""
    identifier = FIRST_ID[split] + number
    rng = np.random.default_rng([sample.seed, 1, identifier])
    short = round(sample.size * SHORT)
    width, height = [(sample.size, sample.size), (sample.size, short), (short, sample.size)][rng.integers(3)]
    empty = split == "training" and identifier % EMPTY_EVERY == 0
    picture, boxes, names = scene(rng, width, height, 0 if empty else int(rng.integers(2, 7)))
    rounded = [[round(edge, 2) for edge in box] for box in boxes]
    label = {"bboxes": rounded, "image_size": [width, height], "labels": names}
    folder = top / split
    picture.save(folder / "images" / f"{identifier}.JPEG", quality=int(rng.integers(70, 93)))
    (folder / "labels" / f"{identifier}.yml").write_text(yaml.safe_dump(label))


def pack(folder: Path, archive: Path) -> None:
    """Pack what is in `folder` as a gzip squashfs archive. Raises: EnvironmentProblem."""
    command = ["mksquashfs", str(folder), str(archive), "-comp", "gzip", "-all-root", "-no-progress"]
    # the variable fixes every time stamp, so that the archive's hash depends on its content alone
    variables = {**os.environ, "SOURCE_DATE_EPOCH": "0"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentProblem(f"mksquashfs {archive}: exit {done.returncode}: {done.stderr[-300:]}")


def render(root: Path, sample: Sample) -> None:
    """Draw `root`/<archive>/<top folder>/..., on as many processes as the machine lets us use."""
    unlabeled, labeled = (root / name / name for name in ("unlabeled", "labeled"))
    unlabeled.mkdir(parents=True)
    for split in FIRST_ID:
        for kind in ("images", "labels"):
            (labeled / split / kind).mkdir(parents=True)
    cores = len(os.sched_getaffinity(0))
    # spawn: a fork of a process with threads (torch, BLAS) can hang
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(draw_unlabeled, unlabeled, sample, number) for number in range(sample.unlabeled)]
        for split, count in (("training", sample.training), ("validation", sample.validation)):
            tasks += [pool.submit(draw_labeled, labeled, sample, split, number) for number in range(count)]
        for task in tasks:
            task.result()


def read_manifest(dest: Path) -> dict[str, Any]:
    """What an earlier run left in `dest`; empty if none did.

    Raises: InputError if archives are there that this program did not write: they are never overwritten.
    """
    manifest = dest / MANIFEST
    if manifest.exists():
        try:
            return dict(json.loads(manifest.read_text()))
        except ValueError as error:
            raise InputError(f"{manifest} is damaged ({error}): remove it and both archives") from error
    for name in (UNLABELED, LABELED):
        if (dest / name).exists():
            raise InputError(f"{dest / name} exists, was not generated (no {MANIFEST}): use another folder")
    return {}


def make(dest: Path, sample: Sample) -> bool:
    """Write the archives to the folder `dest`; False if they were there, whole and of these parameters.

    Raises: InputError for impossible amounts and for a `dest` with archives of somebody else;
    EnvironmentProblem without mksquashfs.
    """
    if found := sample.problems():
        raise InputError("sample data: " + "; ".join(found))
    before = read_manifest(dest)
    archives = (UNLABELED, LABELED)
    if before.get("parameters") == dataclasses.asdict(sample) and all(
        (dest / name).exists() and sha256(dest / name) == before["sha256"][name] for name in archives
    ):
        return False
    if shutil.which("mksquashfs") is None:
        raise EnvironmentProblem("mksquashfs is not installed: install the package squashfs-tools")
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest, prefix=".sample-") as temporary:
        root = Path(temporary)
        render(root, sample)
        for name in archives:
            pack(root / Path(name).stem, root / name)
        # first the manifest: after a crash in between, its hashes do not match and the next run starts over
        hashes = {name: sha256(root / name) for name in archives}
        write_json(dest / MANIFEST, {"parameters": dataclasses.asdict(sample), "sha256": hashes})
        for name in archives:
            os.replace(root / name, dest / name)
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.sample_data", description="Write the demo data.")
    parser.add_argument("dest", type=Path, help="folder for unlabeled.sqsh and labeled.sqsh")
    for field in dataclasses.fields(Sample):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="default: %(default)s")
    arguments = vars(parser.parse_args(argv))
    dest = arguments.pop("dest")
    written = make(dest, Sample(**arguments))
    print(f"{dest / UNLABELED} and {dest / LABELED}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    cli(main)
