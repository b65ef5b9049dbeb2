"""One table for a chain, from Slurm and from the chain's own files."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import state, tagged
from jobs.scheduler import Job
from jobs.stages import Chain
from utils import metrics
from utils.slurm import FINAL

COLUMNS = ("stage", "state", "job", "node", "epoch/step", "newest", "elapsed", "restarts", "cause", "log")


def table(chain: Chain) -> str:
    """The state of every stage of a chain, and what Slurm did not answer."""
    records = {stage: state.read(chain, stage) for stage in chain.stages}
    submitted = tagged.submitted(chain)
    ids, jobs, notes = tagged.find(chain, records)
    rows = [list(COLUMNS)]
    words: dict[str, str] = {}
    for stage, record in records.items():
        job_id, job = ids.get(stage), jobs.get(stage)
        if job_id and record.get("job_id") != job_id:  # the marker is of an earlier job
            entry = submitted.get(stage, {})
            record = {"status": "todo", "log": entry["log"] if entry.get("job_id") == job_id else ""}
        words[stage], cause = _state(record, job_id, job)
        parents = [parent for parent in chain.stages[stage].parents if words[parent] != "DONE"]
        if words[stage] == "CANCELLED" and parents:
            cause = f"{parents[0]} is {words[parents[0]]}"
        epoch, newest = _progress(chain, stage, record)
        node = job.node if job else record.get("host", "")
        restarts = str(record.get("restarts", ""))
        where = [job_id or record.get("job_id", ""), node]
        log = record.get("log", "")
        rows.append([stage, words[stage], *where, epoch, newest, _elapsed(record, job), restarts, cause, _short(log)])
    return "\n".join([f"chain {chain.name}  {chain.dir.path}", columns(rows), *notes])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _state(record: Mapping[str, Any], job_id: str | None, job: Job | None) -> tuple[str, str]:
    """(state, cause) of a stage from its marker and its job."""
    status = record["status"]
    if status == "done":
        return "DONE", ""
    if job and job.state not in FINAL:
        requeued = status in ("preempted", "running")  # its marker is of this job
        pending = f"{'REQUEUED' if requeued else 'PENDING'} ({job.reason})"
        return (pending if job.state == "PENDING" else job.state), record["cause"] if status == "preempted" else ""
    if status in ("stale", "failed", "preempted"):
        cancelled = status == "preempted" and job and job.state == "CANCELLED"
        return "CANCELLED" if cancelled else status.upper(), record["cause"] or ""
    if job:
        return job.state, "" if job.state == "CANCELLED" else f"Slurm: {job.state} {job.reason}; see the log"
    if status == "running":
        if job_id or not _alive(record):
            return "FAILED (gone)", f"{'job' if job_id else 'process'} {record['job_id']} is gone"
        return "RUNNING", ""
    return ("CANCELLED", "") if job_id else ("TODO", "")


def _alive(record: Mapping[str, Any]) -> bool:
    """Whether a local run still goes on; one on another host is believed to."""
    return record["host"] != socket.gethostname() or Path(f"/proc/{record['job_id']}").exists()


def _progress(chain: Chain, stage: str, record: Mapping[str, Any]) -> tuple[str, str]:
    """(epoch/step, newest loss and AP) from the stage's metrics."""
    newest: dict[str, Any] = {}
    file = chain.run_dir(stage).metrics
    for line in metrics.read(file) if file.exists() else ():
        newest.update(line)
    values = newest | record.get("metrics", {})
    shown = [f"{name} {values[name]:.4f}" for name in ("loss", "AP") if values.get(name) is not None]
    return f"{newest['epoch']}/{newest['step']}" if newest else "", "  ".join(shown)


def _elapsed(record: Mapping[str, Any], job: Job | None) -> str:
    if "started" not in record:
        return job.elapsed if job and job.state != "PENDING" else ""
    started, ended = (datetime.datetime.fromisoformat(record[key] or state.now()) for key in ("started", "ended"))
    return str(ended - started)


def _short(log: str) -> str:
    """A log's path, relative where it is below here; empty before the log is there."""
    if not log or not Path(log).exists():
        return ""
    return os.path.relpath(log) if Path(log).is_relative_to(Path.cwd()) else log
