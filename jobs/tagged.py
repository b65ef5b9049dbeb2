"""The jobs of a chain: what the launcher wrote down, and which jobs in Slurm's queue are its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import state
from jobs.scheduler import Job, lookup
from jobs.stages import Chain
from utils.errors import EnvironmentProblem, InputError
from utils.paths import ROOT
from utils.slurm import call

ENDING = 90  # seconds; Slurm gives a job half a minute (KillWait) to end, unless the site says more
TAG = re.compile(r"relay:([^:]+):([^:]+)(?::([0-9a-f]+))?(:hold)?")


def submitted(chain: Chain) -> dict[str, dict[str, Any]]:
    """What the launcher wrote down: stage -> job_id (None until sbatch has given it), token, submitted, log, config."""
    try:
        return json.loads(chain.dir.jobs.read_text())
    except FileNotFoundError:
        return {}


def job_name(chain: Chain, stage: str) -> str:
    return f"{chain.name}-{stage}"


def tag(chain: Chain, stage: str, token: str, stays_held: bool) -> str:
    """The comment of a job, by which it is found: ids are given again by a slurmctld that lost its state.

    `token` tells one submission from another. Jobs of slurm/chain.slurm have a comment without it.
    """
    return f"relay:{chain.name}:{stage}:{token}{':hold' if stays_held else ''}"


@dataclass(frozen=True)
class Queued:
    """A job of a chain that is queued or running."""

    stage: str
    id: str
    token: str  # of the launcher's submission; else empty
    pending: bool
    ending: bool  # and after that in the queue again, if it was preempted
    releasable: bool  # held by a launcher, which died before it released the chain, or will do it soon
    dependency: str  # what it still waits for, in Slurm's words

    def waits_for(self, jobs: Collection[str]) -> bool:
        """Whether it cannot start before these jobs have ended well."""
        return not self.pending or set(jobs) <= set(re.findall(r"\d+", self.dependency))


def is_used(chain: Chain) -> bool:
    """Whether anything of the chain has been a Slurm job, as far as its own files know."""
    return bool(submitted(chain)) or any(state.read(chain, stage).get("slurm") for stage in chain.stages)


def queued(chain: Chain, ask: Callable[..., str] = call) -> list[Queued]:
    """Every job of the chain that squeue lists, queued or running, the newest last.

    Those with the chain's tag that were submitted in this checkout, and those that have marked a stage as running.
    Raises: EnvironmentProblem if squeue does not answer.
    """
    if not shutil.which("squeue"):
        return []
    running = {}
    for stage in chain.stages:
        record = state.read(chain, stage)
        if record.get("slurm") and (not record["ended"] or record["status"] == "preempted"):
            running[record["job_id"]] = stage
    found = []
    for line in ask("squeue", "-h", "-u", str(os.getuid()), "-o", "%A|%T|%Q|%r|%E|%k|%Z").splitlines():
        if line.count("|") < 6:  # of a comment with a line break in it, which none of ours has
            continue
        job, now, priority, reason, dependency, rest = line.split("|", 5)
        comment, _, folder = rest.rpartition("|")
        name, stage, token, hold = chain.name, running.get(job, ""), "", ""
        if (match := TAG.fullmatch(comment)) and Path(folder).resolve() == ROOT:
            name, stage, token, hold = match.groups("")
        if name == chain.name and stage in chain.stages:
            held = priority == "0" and reason != "JobHeldAdmin" and bool(token) and not hold
            found.append(Queued(stage, job, token, now == "PENDING", now == "COMPLETING", held, dependency))
    return sorted(found, key=lambda item: int(item.id))


def settled(chain: Chain, ask: Callable[..., str] = call) -> list[Queued]:
    """`queued`, once no job is about to end. Raises: InputError if one takes longer than Slurm should let it."""
    end = time.monotonic() + ENDING
    while True:
        found = queued(chain, ask)
        ending = [job for job in found if job.ending]
        if not ending:
            return found
        if time.monotonic() > end:
            raise InputError(f"{ending[0].stage} (job {ending[0].id}) is ending, for {ENDING} s now; try again later")
        time.sleep(0.5)


def configuration(chain: Chain, job: Queued) -> Mapping[str, Any] | None:
    """The configuration a job was submitted with; None if nobody has written it down."""
    entry, record = submitted(chain).get(job.stage, {}), state.read(chain, job.stage)
    if entry.get("job_id") == job.id or (job.token and entry.get("token") == job.token):
        return entry["config"]
    return record.get("config") if record.get("job_id") == job.id else None


def find(chain: Chain, records: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, Job], list[str]]:
    """(stage -> id of its newest job, stage -> what Slurm knows of it, calls that failed).

    The newest job is one that is queued or runs, else the launcher's last one, or that of a plain sbatch
    which began since.
    """
    entries = submitted(chain)
    ids: dict[str, str] = {}
    for stage, record in records.items():
        entry = entries.get(stage, {"job_id": None})
        if entry["job_id"] and entry["submitted"] >= record.get("started", ""):
            ids[stage] = entry["job_id"]
        elif record.get("slurm"):
            ids[stage] = record["job_id"]
    alive: dict[str, str] = {}
    problems: list[str] = []
    try:
        alive = {job.stage: job.id for job in queued(chain)}
    except EnvironmentProblem as error:
        problems += [str(error)] if is_used(chain) else []  # else there is a squeue, but perhaps no Slurm
    ids |= alive
    jobs, notes = lookup(ids.values())
    found = {
        stage: jobs[job]
        for stage, job in ids.items()
        # a controller that lost its state gives ids again: one that never began must also have our name
        if job in jobs
        and (job in (alive.get(stage), records[stage].get("job_id")) or jobs[job].name == job_name(chain, stage))
    }
    return ids, found, list(dict.fromkeys(problems + notes))
