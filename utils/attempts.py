"""What each attempt of a stage has spent its wall time on, as utils/timeline.py keeps it. Torch-free.

Its parts are measured by one clock, its beginning and its end by another: where they differ, something was not
counted, or twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.paths import RunDir

PARTS = ("start-up", "staging", "labels", "data wait", "compute", "validation", "evaluation", "saving")
SLACK, SHARE = 1.0, 0.001  # seconds, and of the wall time, by which sums may be wrong


@dataclass(frozen=True)
class Attempt:
    """What one process of rank 0 has kept; times in Unix seconds."""

    file: Path
    began: float
    at: float  # of the last writing
    world_size: int
    device: str
    cores: int  # of a rank
    seconds: dict[str, float]
    unsaved: dict[str, float]  # of `seconds`, what was not in a checkpoint yet
    commit: str | None  # of the code

    @classmethod
    def of(cls, file: Path) -> Attempt:
        """Raises: InputError when the file is damaged."""
        try:
            content = json.loads(file.read_text())
            numbers = {name: float(content[name]) for name in ("began", "at")}
            counts = {name: int(content[name]) for name in ("world_size", "cores")}
            parts = {
                name: {str(part): float(seconds) for part, seconds in content[name].items()}
                for name in ("seconds", "unsaved")
            }
            words = {"device": str(content["device"]), "commit": content.get("commit")}
            if not all(map(math.isfinite, [*numbers.values(), *parts["seconds"].values(), *parts["unsaved"].values()])):
                raise ValueError("a number is not finite")
            found = cls(file=file, **words, **numbers, **counts, **parts)  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{file}: damaged, left out: {type(error).__name__}: {error}") from None
        if unknown := {*found.seconds, *found.unsaved} - set(PARTS):
            raise InputError(f"{file}: damaged, left out: parts {', '.join(sorted(unknown))}")
        return found

    def problems(self) -> list[str]:
        """What does not add up."""
        wall, total = self.at - self.began, sum(self.seconds.values())
        found = []
        if abs(total - wall) > SLACK + SHARE * abs(wall):
            found.append(f"{self.file}: its parts are {total - wall:+.1f} s from its wall time of {wall:.1f} s")
        more = [part for part, seconds in self.unsaved.items() if seconds > self.seconds.get(part, 0.0) + SLACK]
        return found + [f"{self.file}: more {part} is unsaved than there was" for part in more]


def read(run_dir: RunDir) -> tuple[list[Attempt], list[str]]:
    """A stage's attempts in the order in which they began, and what is damaged."""
    found, problems = [], []
    for file in run_dir.times.glob("*.json"):
        try:
            found.append(Attempt.of(file))
        except InputError as error:
            problems.append(str(error))
    return sorted(found, key=lambda attempt: attempt.began), problems


def restarts(run_dir: RunDir, marker: Mapping[str, Any]) -> int:
    """How often a stage was begun again, by Slurm, which its marker tells of the newest job, or by hand."""
    known = marker.get("restarts")
    return max(known if isinstance(known, int) else 0, len(list(run_dir.times.glob("*.json"))) - 1)


def ran_before(run_dir: RunDir, moment: float) -> float:
    """Seconds of the attempts that had ended at a moment in Unix time."""
    return sum(attempt.at - attempt.began for attempt in read(run_dir)[0] if attempt.at <= moment)
