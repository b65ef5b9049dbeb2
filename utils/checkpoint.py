"""Checkpoints: their keys, names, atomic write, retention, and where a run starts from.

One file is enough to go on or to evaluate. It holds tensors, numbers, strings, lists and dicts only, so
`torch.load(weights_only=True)` reads it, and that is the only way anything is read here.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision

from utils import dist, files, log, paths
from utils.errors import InputError

FORMAT = "relay-1"
KEEP = 2  # newest checkpoints kept besides the best
NAME = re.compile(r"checkpoint_\d{4,}\.pth")
BEST = "best.pth"


def payload(
    kind: str,
    *,
    state: Any,
    architecture: Mapping[str, Any],
    config: Mapping[str, Any],
    world_size: int,
    **extra: Any,
) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        kind: what the weights are, `moco` or `detector`; see `load`.
        state: the engine's TrainState.
        architecture: everything needed to build the model again.
        extra: what one kind has besides (a detector its classes).
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "epochs_done": state.epoch,
        "step": state.step,
        "start_step": state.start_step,
        "best": state.best,
        "summary": dict(state.summary),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "architecture": dict(architecture),
        "config": dict(config),
        "world_size": world_size,
        "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)},
        **extra,
    }


def restore(state: Any, saved: Mapping[str, Any], *, same_round: bool) -> None:
    """Put a checkpoint's weights, optimizer state and counters into the engine's TrainState.

    The optimizer keeps this run's hyperparameters (momentum, weight decay, ...): the stored ones are the saving run's.
    In a new round (`same_round=False`) the counters go on, and the round starts at the step they show.
    """
    state.model.load_state_dict(saved["model"])
    own = [{key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(saved["optimizer"])
    for group, settings in zip(state.optimizer.param_groups, own, strict=True):
        group.update(settings)
    state.epoch, state.step, state.best = saved["epochs_done"], saved["step"], saved["best"]
    state.summary = dict(saved["summary"])
    state.start_step = saved["start_step"] if same_round else saved["step"]


def save(directory: Path, content: Mapping[str, Any], *, best: bool) -> Path:
    """Write `checkpoint_<last epoch>.pth` atomically; keep the newest two and, as `best.pth`, the best."""
    path = directory / f"checkpoint_{content['epochs_done'] - 1:04d}.pth"
    if best:  # first: after a kill in between, the epoch is done again and is the best again
        write(directory / BEST, content)
        adopt(directory / BEST, path)
    else:
        write(path, content)
    for old in everything(directory)[:-KEEP]:
        old.unlink()
    return path


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write one weights file atomically."""
    files.write_atomic(path, lambda file: torch.save(dict(content), file))


def adopt(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically: a hard link, or a copy between file systems."""
    temporary = target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def everything(directory: Path) -> list[Path]:
    """The epoch checkpoints of a directory, oldest first (by the epoch in the name: clocks differ between nodes)."""
    return sorted((path for path in directory.glob("*") if NAME.fullmatch(path.name)), key=_epoch)


def _epoch(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def newest(directory: Path) -> Path | None:
    """The newest epoch checkpoint, if there is any."""
    return next(reversed(everything(directory)), None)


def starting_point(resume: str, init: str | None, directory: Path, restarts: int) -> tuple[Path | None, bool]:
    """(the checkpoint to start from or None, whether it belongs to this same round).

    `auto`: this run's newest, else the round before (`init`). `never`: only `init`. A path: that file. Once the job
    was requeued, this run's newest is further than any of them. Raises: InputError when a named file is missing.
    """
    path, same_round = _starting_point(resume, init, directory, restarts)
    # one choice for all: file systems may show nodes different listings
    agreed = dist.agree(f"{int(same_round)}{path or ''}")
    return Path(agreed[1:]) if agreed[1:] else None, agreed[0] == "1"


def _starting_point(resume: str, init: str | None, directory: Path, restarts: int) -> tuple[Path | None, bool]:
    own = newest(directory) if resume == "auto" or restarts else None
    if own:
        return own, True
    named = resume if resume not in ("auto", "never") else init
    if named is None:
        return None, False
    if not Path(named).is_file():
        raise InputError(f"checkpoint {named}: no such file")
    return Path(named), Path(named).resolve().parent == directory.resolve()


def make_room(directory: Path, epochs_done: int) -> None:
    """Set aside the checkpoints of later epochs than a run starts from (0: all): they are another history's.

    Left there, they would be the newest ones for retention and for the next resume.
    """
    later = [path for path in everything(directory) if _epoch(path) >= epochs_done]
    if not later:
        return
    aside = paths.free_name(directory)
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    log.info(f"checkpoints of another history are now in {aside}")


def load(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU.

    Raises: InputError when it is not one, or holds another kind than `kind` (then `remedy` says what to do).
    """
    content = read(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project (format {content.get('format')!r}); {remedy}")
    if content["kind"] != kind:
        raise InputError(f"{path}: a {content['kind']} checkpoint, not a {kind}; {remedy}")
    log.info(f"{path}: {kind} after {content['epochs_done']} epochs, {content['step']} steps")
    return content


def read(path: Path) -> dict[str, Any]:
    """Any torch file that holds a dict, on the CPU; refuses whatever could run code. Raises: InputError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path}: not a readable weights file: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content
