"""Where a process's wall time goes: every moment since it was started belongs to one part, and rank 0 keeps the sums.

`done(part)` ends one of `attempts.PARTS`; it began where the one before ended. A phase is a piece of what comes before
the first training step: they are told in one line of the log, as what a job pays each time it is requeued.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import env, files, log, revision
from utils.errors import RelayError
from utils.paths import RunDir

EVERY = 10.0  # seconds between two writings of the file
AGAIN = ("data wait", "compute", "validation", "evaluation")  # a restart does these again since the last checkpoint
UNDER_WAY = {"data wait": "compute", "compute": "data wait"}  # part that ended last -> the one that an error cuts short


def clock() -> float:
    """Seconds since boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _started() -> float:
    """When this process was started, on `clock` (proc(5), field 22 of stat)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


class Timeline:
    """Seconds by part since `began`, on `clock`."""

    def __init__(self, began: float) -> None:
        self.began = time.time() - (clock() - began)  # Unix time: the end is told by it too, so that sums are checked
        self.ended, self.part = began, "start-up"
        self.seconds: dict[str, float] = {}
        self.at_save: dict[str, float] = {}  # `seconds` at the last checkpoint
        self.file: Path | None = None
        self.about: dict[str, Any] = {}
        self.written, self.is_over = -math.inf, False

    def done(self, part: str) -> None:
        now = clock()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.ended
        self.ended, self.part = now, part
        if now - self.written >= EVERY:
            self.write()

    def saved(self, part: str) -> None:
        self.done(part)
        self.at_save = dict(self.seconds)
        self.write()

    def end(self) -> None:
        self.is_over = True
        self.done(UNDER_WAY.get(self.part, self.part))
        self.write()

    def write(self) -> None:
        """Raises: EnvironmentProblem when the disk is full."""
        if self.file is None:
            return
        unsaved = {part: self.seconds.get(part, 0.0) - self.at_save.get(part, 0.0) for part in AGAIN}
        times = {
            "began": self.began,
            "at": time.time(),
            "seconds": self.seconds,
            "unsaved": {part: seconds for part, seconds in unsaved.items() if seconds},
            "ended": self.is_over,
        }
        files.write_json(self.file, self.about | times)
        self.written = self.ended


_timeline = Timeline(_started())
_phases = [("", _timeline.ended)]  # those so far, and when each ended
_is_told = False


def done(part: str, phase: str | None = None) -> None:
    """The time since the last call belongs to `part`, and is, or ends, a `phase`; the same name again adds to it."""
    global _timeline
    if _timeline.is_over:  # another run in the same process: it begins here
        _timeline = Timeline(clock())
    _timeline.done(part)
    if phase:
        _phases.append((phase, _timeline.ended))


def saved(part: str = "saving") -> None:
    """`part` ends here, and a restart would go on from here: what was computed so far is not done again."""
    _timeline.saved(part)


def is_done_again(part: str, seconds: float) -> None:
    """That much of `part` does a restart do again, though a checkpoint was saved after it."""
    _timeline.at_save[part] = _timeline.at_save.get(part, 0.0) - seconds


def spent(part: str) -> float:
    """Seconds of this run that belong to `part` so far."""
    return _timeline.seconds.get(part, 0.0)


def first_step() -> None:
    """A training step ends here: if it is the first of this process, log the phases."""
    global _is_told
    if _is_told:
        return
    _is_told = True
    done("compute", "first step")
    seconds: dict[str, float] = {}
    for (_, began), (phase, ended) in itertools.pairwise(_phases):
        seconds[phase] = seconds.get(phase, 0.0) + ended - began
    parts = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    log.info(f"first step after {sum(seconds.values()):.1f} s: {parts}")


@contextlib.contextmanager
def kept(run_dir: RunDir, world: env.World, device: str) -> Iterator[None]:
    """Rank 0 keeps this attempt's times in a file of `run_dir` until the end of the block, whatever ends it.

    The file is written at most every `EVERY` seconds, when a checkpoint was saved, and at the end; a process that is
    killed leaves what was written last. Args: device: in words.
    """
    if world.rank:
        yield
        return
    own = _timeline
    own.file = run_dir.attempt(env.job_id(), env.restarts(), own.began)
    own.about = {"job": env.job_id(), "restarts": env.restarts(), "world_size": world.size, "device": device}
    own.about |= {"cores": _cores(world), "commit": revision.commit()}
    own.done("start-up")
    try:
        yield
    except BaseException:
        with contextlib.suppress(RelayError, OSError):  # the cause to tell is what ended the run
            own.end()
        raise
    own.end()


def _cores(world: env.World) -> int:
    """How many cores this rank may use."""
    own = os.environ.get("SLURM_CPUS_PER_TASK") if world.launcher == "slurm" else None
    return int(own or max(1, len(os.sched_getaffinity(0)) // world.local_size))
