"""The jobs of a chain: what the launcher wrote down, and which jobs in Slurm's queue are its own."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jobs import scheduler, state
from jobs.scheduler import Job
from jobs.stages import Chain
from utils.errors import InputError
from utils.paths import ROOT
from utils.slurm import call

ENDING = 90  # seconds; Slurm gives a job half a minute (KillWait) to end, unless the site says more
TAG = re.compile(r"relay:([^:]+):([^:]+)(?::([0-9a-f]+))?(:hold)?")


def submitted(chain: Chain) -> dict[str, dict[str, Any]]:
    """What the launcher wrote down: stage -> job_id (None until sbatch has given it), token, submitted, log, config.

    Raises: InputError when the file is damaged.
    """
    try:
        entries = json.loads(chain.dir.jobs.read_text())
        if all(entry.keys() >= {"job_id", "token", "submitted", "log", "config"} for entry in entries.values()):
            return entries
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError):
        pass
    raise InputError(f"{chain.dir.jobs} is damaged; cancel the chain's jobs by scancel, and remove it")


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


class Written(NamedTuple):
    """What a chain's own files say."""

    chain: Chain
    records: Mapping[str, Mapping[str, Any]]  # stage -> its marker
    submitted: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, chain: Chain) -> Written:
        """Raises: InputError when one of the files is damaged."""
        return cls(chain, {stage: state.read(chain, stage) for stage in chain.stages}, submitted(chain))

    @property
    def is_used(self) -> bool:
        """Whether anything of the chain has been a Slurm job, as far as these files know."""
        return bool(self.submitted) or any(record.get("slurm") for record in self.records.values())


def queued(chain: Chain, ask: Callable[..., str] = call) -> list[Queued]:
    """Every job of the chain that squeue lists, queued or running, the newest last.

    Those with the chain's tag that were submitted in this checkout, and those that have marked a stage as running.
    Raises: EnvironmentProblem if squeue does not answer.
    """
    return own(Written.read(chain), scheduler.listed(ask=ask)) if shutil.which("squeue") else []


def own(written: Written, jobs: Iterable[Job]) -> list[Queued]:
    """Those of the jobs that are the chain's."""
    chain = written.chain
    running = {}
    for stage, record in written.records.items():
        if record.get("slurm") and (not record["ended"] or record["status"] == "preempted"):
            running[record["job_id"]] = stage
    found = []
    for job in jobs:
        name, stage, token, hold = chain.name, running.get(job.id, ""), "", ""
        match = TAG.fullmatch(job.comment)
        if match and (match[1] == name or stage) and Path(job.folder).resolve() == ROOT:  # which takes long
            name, stage, token, hold = match.groups("")
        if name == chain.name and stage in chain.stages:
            held = job.priority == "0" and job.reason != "JobHeldAdmin" and bool(token) and not hold
            now = job.state == "PENDING", job.state == "COMPLETING"
            found.append(Queued(stage, job.id, token, *now, held, job.dependency))
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
