"""Checkpoints as files: their names, their order, and the hash beside each."""

from __future__ import annotations

import math
import re
import stat
from pathlib import Path

from utils import ahead, files
from utils.errors import CheckpointError

KEEP = 2  # newest checkpoints kept besides the best
NAME = re.compile(r"checkpoint_(\d{4,})(?:_(\d{8,}))?\.pth")
BEST = "best.pth"


def name(epoch: int, step: int | None = None) -> str:
    """The file of a whole `epoch`, or of its first part up to `step` of the run."""
    return f"checkpoint_{epoch:04d}.pth" if step is None else f"checkpoint_{epoch:04d}_{step:08d}.pth"


def position(name: str) -> tuple[int, float]:
    """Where in the run a checkpoint of that name was saved, to compare with others: clocks differ between nodes."""
    match = NAME.fullmatch(name)
    assert match
    return int(match[1]), int(match[2]) if match[2] else math.inf


def everything(directory: Path) -> list[Path]:
    """The checkpoints of a directory, oldest first."""
    found = [path for path in directory.glob("*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: position(path.name))


def newest(directory: Path) -> Path | None:
    """The newest checkpoint, if there is any."""
    return next(reversed(everything(directory)), None)


def sidecar(path: Path) -> Path:
    """Where the hash of `path` is, as `sha256sum --check` reads it."""
    return path.with_name(f"{path.name}.sha256")


def record(path: Path, digest: str) -> None:
    """Write the hash that `path` has, or will have when it appears."""
    files.write_text(sidecar(path), f"{digest}  {path.name}\n")


def known(path: Path) -> str | None:
    """The hash written when `path` was saved, if there is one. Raises: InputError when that file holds none."""
    return files.read_sha256(sidecar(path))


def verify(path: Path) -> bool:
    """Whether the hash of `path` is known. Raises: CheckpointError when it is, and the file has another."""
    expected = known(path)
    if expected and path.exists() and ahead.sha256(path) != expected:
        raise CheckpointError(f"{path}: damaged: its sha256 is not the one written when it was saved")
    return expected is not None


def prune(directory: Path) -> None:
    """Remove all but the newest checkpoints, and hashes without a file.

    A read-only file stays: it is the output of a stage that is done, and another stage may start from it.
    """
    for path in everything(directory)[:-KEEP]:
        if path.stat().st_mode & stat.S_IWUSR:
            path.unlink()
    for path in directory.glob("*.sha256"):
        if not path.with_suffix("").exists():
            path.unlink()
