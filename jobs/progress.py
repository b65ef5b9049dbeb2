"""How far a stage is and for how long it has run, as cells of the table of a chain."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping
from typing import Any

from jobs import state
from jobs.scheduler import Job
from utils import attempts, metrics
from utils.paths import RunDir

PROGRESS = ("epoch", "step", "images/s", "loss", "AP", "left")


def progress(run_dir: RunDir, record: Mapping[str, Any], goes_on: bool) -> list[str]:
    """PROGRESS from a stage's metrics; runs of earlier versions have not written all of it.

    Args: record: its marker; goes_on: it is running just now.
    """
    file = run_dir.metrics
    newest = metrics.newest(file)
    values = newest | record.get("metrics", {})
    step = "/".join(str(newest[key]) for key in ("step", "steps") if key in newest)
    rate = f"{newest['images_per_s']:.1f}" if "images_per_s" in newest else ""
    scores = [f"{values[name]:.4f}" if values.get(name) is not None else "" for name in ("loss", "AP")]
    left = newest.get("left_s") if goes_on else None
    if left is not None:
        written = file.stat().st_mtime
        began = datetime.datetime.fromisoformat(record["started"]).timestamp()
        left -= time.time() - written if written > began else 0  # else by the attempt before, and this is on its way
    return [str(newest.get("epoch", "")), step, rate, *scores, "" if left is None else clock(left)]


def clock(seconds: float) -> str:
    """h:mm:ss or m:ss; nothing for what is no number."""
    if not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def elapsed(run_dir: RunDir, record: Mapping[str, Any], job: Job | None) -> str:
    """How long the stage has run, in all its attempts; until one begins, its job."""
    if "started" not in record:
        return job.elapsed if job and job.state != "PENDING" else ""
    started, ended = (datetime.datetime.fromisoformat(record[key] or state.now()) for key in ("started", "ended"))
    before = attempts.ran_before(run_dir, started.timestamp())
    return str(ended - started + datetime.timedelta(seconds=round(before)))
