"""One table for a chain, or for all of them, from Slurm and from the chains' own files."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jobs import state, tagged
from jobs.scheduler import Job
from jobs.stages import Chain
from jobs.tagged import Jobs, Written
from utils import metrics, paths
from utils.errors import InputError, one_line
from utils.slurm import FINAL

COLUMNS = ("stage", "state", "job", "node", "epoch/step", "newest", "elapsed", "restarts", "cause", "log")


class Shown(NamedTuple):
    """How far a stage is."""

    record: Mapping[str, Any]  # its marker, if that is of its newest job
    word: str
    cause: str


def table(chain: Chain) -> str:
    """The state of every stage of a chain, and what Slurm did not answer."""
    written = Written.read(chain)
    (jobs,), notes = tagged.find([written])
    shown = _stages(written, jobs)
    rows = [COLUMNS, *(_row(chain, stage, now, jobs) for stage, now in shown.items())]
    return "\n".join([f"chain {chain.name}  {chain.dir.path}", columns(rows), *notes])


def overview(like: Chain) -> str:
    """A line for each chain that has a directory, and what Slurm did not answer.

    Each is taken for a chain of the stages of `like`; its line is that of its first stage that is not done.
    """
    found: list[Written] = []
    rows: dict[str, list[str]] = {}
    for folder in sorted(paths.chains()):
        try:
            found.append(Written.read(replace(like, name=folder)))
        except (InputError, OSError) as error:
            rows[folder] = _unknown(folder, error)
    answers, notes = tagged.find(found)
    for written, jobs in zip(found, answers, strict=True):
        name = written.chain.name
        try:
            rows[name] = _line(written, jobs)
        except (InputError, OSError) as error:
            rows[name] = _unknown(name, error)
    lines = [rows[name] for name in sorted(rows)]
    return "\n".join([columns([["chain", "done", *COLUMNS[:-1]], *lines]), *notes])


def _unknown(name: str, error: Exception) -> list[str]:
    """The line of a chain whose files are damaged, or are of other stages."""
    return [name, "", "", "UNKNOWN", *[""] * 6, one_line(error)]


def _line(written: Written, jobs: Jobs) -> list[str]:
    """The line of one chain among others: its first stage that is not done, else its last."""
    chain, shown = written.chain, _stages(written, jobs)
    others = {file.parent.name for file in chain.dir.path.glob("*/state.json")} - shown.keys()
    if foreign := sorted(name for name in others if not paths.is_set_aside(name)):
        raise InputError(f"has {', '.join(foreign)}, no stage of {chain.file.name}: ask with its own --file")
    done = [stage for stage, now in shown.items() if now.word == "DONE"]
    stage = next((stage for stage in shown if stage not in done), list(shown)[-1])
    return [chain.name, f"{len(done)}/{len(shown)}", *_row(chain, stage, shown[stage], jobs)[:-1]]


def _stages(written: Written, jobs: Jobs) -> dict[str, Shown]:
    shown: dict[str, Shown] = {}
    for stage, record in written.records.items():
        job_id = jobs.ids.get(stage)
        if job_id and record.get("job_id") != job_id:  # the marker is of an earlier job
            entry = written.submitted.get(stage, {})
            record = {"status": "todo", "log": entry["log"] if entry.get("job_id") == job_id else ""}
        word, cause = _state(record, job_id, jobs.known.get(stage))
        parents = [parent for parent in written.chain.stages[stage].parents if shown[parent].word != "DONE"]
        if word == "CANCELLED" and parents:
            cause = f"{parents[0]} is {shown[parents[0]].word}"
        shown[stage] = Shown(record, word, cause)
    return shown


def _row(chain: Chain, stage: str, shown: Shown, jobs: Jobs) -> list[str]:
    record, job = shown.record, jobs.known.get(stage)
    where = [jobs.ids.get(stage) or record.get("job_id", ""), job.node.strip("()") if job else record.get("host", "")]
    restarts, log = str(record.get("restarts", "")), _short(record.get("log", ""))
    progress = *_progress(chain, stage, record), _elapsed(record, job)
    return [stage, shown.word, *where, *progress, restarts, shown.cause, log]


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
    newest = metrics.newest(chain.run_dir(stage).metrics)
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
