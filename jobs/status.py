"""One table for a chain, or for all of them, from Slurm and from the chains' own files."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jobs import known, store
from jobs.known import Jobs
from jobs.progress import PROGRESS, elapsed, progress
from jobs.scheduler import Job
from jobs.stages import Chain
from jobs.tagged import Written
from utils import attempts, paths
from utils.errors import InputError, RelayError, one_line
from utils.slurm import FINAL

COLUMNS = ("stage", "state", "job", "node", *PROGRESS, "elapsed", "restarts", "cause", "log")


class Shown(NamedTuple):
    """How far a stage is."""

    record: Mapping[str, Any]  # its marker, if that is of its newest job
    word: str
    cause: str


def table(chain: Chain) -> str:
    """The state of every stage of a chain, and what Slurm did not answer."""
    written = Written.read(chain)
    (jobs,), notes = known.find([written])
    return "\n".join([title(chain), columns([COLUMNS, *rows(written, jobs)]), *notes])


def title(chain: Chain) -> str:
    return f"chain {chain.name}  {chain.dir.path}"


def rows(written: Written, jobs: Jobs) -> list[list[str]]:
    """COLUMNS of every stage of a chain."""
    return [_row(written.chain, stage, now, jobs) for stage, now in _stages(written, jobs).items()]


def refreshed(chain: Chain) -> list[str]:
    """Have the markers here that the chain's store has; what kept it from that."""
    try:
        store.refresh(chain)
    except (RelayError, OSError) as error:
        return [f"as far as this machine knows: {one_line(error)}"]
    return []


def overview(like: Chain) -> str:
    """A line for each chain that has a directory, and what Slurm did not answer.

    Each is taken for a chain of the stages of `like`; its line is that of its first stage that is not done.
    """
    found: list[Written] = []
    lines: dict[str, list[str]] = {}
    for folder in sorted(paths.chains()):
        try:
            found.append(Written.read(replace(like, name=folder)))
        except (InputError, OSError) as error:
            lines[folder] = _unknown(folder, error)
    answers, notes = known.find(found)
    for written, jobs in zip(found, answers, strict=True):
        name = written.chain.name
        try:
            lines[name] = _line(written, jobs)
        except (InputError, OSError) as error:
            lines[name] = _unknown(name, error)
    head = ["chain", "done", *COLUMNS[:-1]]
    return "\n".join([columns([head, *(lines[name] for name in sorted(lines))]), *notes])


def _unknown(name: str, error: Exception) -> list[str]:
    """The line of a chain whose files are damaged, or are of other stages."""
    return [name, "", "", "UNKNOWN", *[""] * (len(COLUMNS) - 4), one_line(error)]


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
        word, cause = _state(record, job_id, jobs.known.get(stage), jobs.is_whole)
        parents = [parent for parent in written.chain.stages[stage].parents if shown[parent].word != "DONE"]
        if word == "CANCELLED" and parents:
            cause = f"{parents[0]} is {shown[parents[0]].word}"
        shown[stage] = Shown(record, word, cause)
    return shown


def _row(chain: Chain, stage: str, shown: Shown, jobs: Jobs) -> list[str]:
    record, job, run_dir = shown.record, jobs.known.get(stage), chain.run_dir(stage)
    where = [jobs.ids.get(stage) or record.get("job_id", ""), job.node.strip("()") if job else record.get("host", "")]
    restarts = str(attempts.restarts(run_dir, record)) if "restarts" in record else ""
    log = _short(record.get("log", ""))
    goes_on = shown.word.startswith("RUNNING") and record["status"] == "running"  # else it has yet to begin
    so_far = *progress(run_dir, record, goes_on), elapsed(run_dir, record, job)
    return [harmless(cell) for cell in (stage, shown.word, *where, *so_far, restarts, shown.cause, log)]


def harmless(text: str) -> str:
    """`text` as one line that changes nothing of a terminal: causes and names come from elsewhere."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _state(record: Mapping[str, Any], job_id: str | None, job: Job | None, is_whole: bool) -> tuple[str, str]:
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
    if job_id and not is_whole:
        return ("RUNNING?" if status == "running" else "QUEUED?"), ""
    if status == "running":
        if job_id or not is_alive(record):
            return "FAILED (gone)", f"{'job' if job_id else 'process'} {record['job_id']} is gone"
        return "RUNNING", ""
    return ("CANCELLED", "") if job_id else ("TODO", "")


def is_alive(record: Mapping[str, Any]) -> bool:
    """Whether a local run still goes on; one on another host is believed to."""
    return record["host"] != socket.gethostname() or Path(f"/proc/{record['job_id']}").exists()


def _short(log: str) -> str:
    """A log's path, relative where it is below here; empty before the log is there."""
    if not log or not Path(log).exists():
        return ""
    return os.path.relpath(log) if Path(log).is_relative_to(Path.cwd()) else log
