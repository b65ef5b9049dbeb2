"""What can be known to fail before a job has waited two days for its turn."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from jobs.plan import Step
from jobs.stages import Chain
from utils.errors import InputError
from utils.squashfs_reader import Reader

DATA_KEYS = ("data.unlabeled", "data.labeled")
FILE_KEYS = ("data.classes", "backbone", "init", "best", "checkpoint", "resume")


def problems(chain: Chain, step: Step, ranks: int) -> Iterator[str]:
    """Why a step would fail when `ranks` processes run it: data, checkpoints, batch."""
    stage, config = chain.stages[step.stage], step.config
    if importlib.util.find_spec(stage.module) is None:
        yield f"no module {stage.module}"
    if "epochs" in config and config["batch_size"] % ranks:  # what trains splits a batch; evaluation's is a rank's own
        yield f"batch_size={config['batch_size']} cannot be split over {ranks} ranks"
    for key in DATA_KEYS:
        if config.get(key) is not None:
            yield from _unusable(key, Path(config[key]).expanduser(), config.get("data.split", "training"))
    for key in dict.fromkeys((*FILE_KEYS, *stage.inputs)):
        value = config.get(key)
        path = Path(value or "")
        if value not in (None, "auto", "never", stage.inputs.get(key)) and not path.is_file():
            near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")])
            yield f"{key}={path}: no such file" + (f"; there are {', '.join(sorted(near))}" if near else "")


def _unusable(key: str, path: Path, split: str) -> Iterator[str]:
    """Why `path` is neither an archive nor a folder of images, or of labelled ones with this split."""
    if path.is_dir():
        from utils.images import SUFFIXES  # and with it Pillow, which an archive does not need here

        if key == "data.unlabeled" and not any(file.suffix.lower() in SUFFIXES for file in path.rglob("*")):
            yield f"{key}: {path}: no image in it ({', '.join(SUFFIXES)})"
        places = [path / split / "images", path / "labeled" / split / "images"]
        if key == "data.labeled" and not any(place.is_dir() for place in places):
            yield f"{key}: {path}: no folder {split}/images or labeled/{split}/images in it"
        return
    try:
        with Reader(path):
            pass
    except InputError as error:
        yield f"{key}: {error}"
