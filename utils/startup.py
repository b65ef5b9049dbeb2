"""Where the time between a process's start and its first training step went: one line of its log.

That is what a job pays for each time it is requeued.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from utils import log


def _began() -> float:
    """When this process was started, on the clock of seconds since boot (proc(5), field 22 of stat)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


_ended = [("", _began())]  # the phases so far, and when each ended
_is_told = False


def done(phase: str) -> None:
    """`phase` ends here; it began where the one before ended. The same name again adds to it."""
    _ended.append((phase, time.clock_gettime(time.CLOCK_BOOTTIME)))


def first_step() -> None:
    """A training step ends here: if it is the first of this process, log the phases."""
    global _is_told
    if _is_told:
        return
    _is_told = True
    done("first step")
    seconds: dict[str, float] = {}
    for (_, began), (phase, ended) in itertools.pairwise(_ended):
        seconds[phase] = seconds.get(phase, 0.0) + ended - began
    parts = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    log.info(f"first step after {sum(seconds.values()):.1f} s: {parts}")
