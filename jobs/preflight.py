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


def problems(chain: Chain, step: Step, ranks: int) -> Iterator[str]:
    """Why a step would fail when `ranks` processes run it: data, checkpoints, batch."""
    stage, config = chain.stages[step.stage], step.config
    if importlib.util.find_spec(stage.module) is None:
        yield f"no module {stage.module}"
    if config["batch_size"] % ranks:
        yield f"batch_size={config['batch_size']} cannot be split over {ranks} ranks"
    for key in DATA_KEYS:
        if config.get(key) is not None:
            yield from _unreadable(key, Path(config[key]).expanduser())
    given = [key for key, source in stage.inputs.items() if config[key] not in (source, None)]
    if config.get("resume") not in (None, "auto", "never"):
        given.append("resume")
    for key in given:
        path = Path(config[key])
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")])
            yield f"{key}={path}: no such file" + (f"; there are {', '.join(sorted(near))}" if near else "")


def _unreadable(key: str, path: Path) -> Iterator[str]:
    if path.is_dir():
        return
    try:
        with Reader(path):
            pass
    except InputError as error:
        yield f"{key}: {error}"
