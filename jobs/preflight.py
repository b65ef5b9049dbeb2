"""What can be known to fail before a job has waited two days for its turn."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

from jobs.plan import Step
from jobs.stages import Chain
from utils import mirror_views, storage
from utils.errors import EnvironmentProblem, InputError
from utils.shared_config import FILE_KEYS
from utils.squashfs_reader import Reader

DATA_KEYS = ("data.unlabeled", "data.labeled")


def problems(chain: Chain, step: Step, ranks: int) -> Iterator[str]:
    """Why a step would fail when `ranks` processes run it: data, checkpoints, batch."""
    stage, config = chain.stages[step.stage], step.config
    if importlib.util.find_spec(stage.module) is None:
        yield f"no module {stage.module}"
    if "epochs" in config and config["batch_size"] % ranks:  # what trains splits a batch; evaluation's is a rank's own
        yield f"batch_size={config['batch_size']} cannot be split over {ranks} ranks"
    for key in DATA_KEYS:
        if config.get(key) is not None:
            yield from _unusable(key, config[key], config.get("data.split", "training"))
    for key in dict.fromkeys(("data.classes", *FILE_KEYS, *stage.inputs)):
        value = config.get(key)
        if value in (None, "auto", "never", stage.inputs.get(key)):
            continue
        if (path := storage.local(value)) is None:
            yield from _missing(key, partial(mirror_views.find, value))
        elif not path.is_file():
            near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")])
            yield f"{key}={path}: no such file" + (f"; there are {', '.join(sorted(near))}" if near else "")


def _unusable(key: str, value: str, split: str) -> Iterator[str]:
    """Why there is neither an archive nor a folder of images, or of labelled ones with this split."""
    if (path := storage.local(value)) is None:
        yield from _missing(key, partial(_look, value, key, split))
        return
    path = path.expanduser()
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


def _missing(key: str, ask: Callable[[], object]) -> Iterator[str]:
    """Why what `ask` asks for in a bucket cannot be used; none of it is fetched."""
    try:
        ask()
    except (InputError, EnvironmentProblem) as error:
        yield f"{key}: {error}"


def _look(url: str, key: str, split: str) -> None:
    """Raises: InputError if there is neither an archive nor a prefix with objects, labelled ones with this split."""
    if of := storage.look(url):
        with Reader(of):
            return
    if key == "data.labeled":
        places = [storage.join(url, f"{above}{split}/images") for above in ("", "labeled/")]
        if all([*_missing(key, partial(storage.look, place))] for place in places):
            raise InputError(f"{url}: no {split}/images or labeled/{split}/images in it")
