"""What Slurm knows of a chain's jobs: the question, which may take long, and what the answer means for its stages."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jobs import scheduler, state, tagged
from jobs.scheduler import Job
from jobs.tagged import Written
from utils.errors import EnvironmentProblem
from utils.slurm import FINAL


class Answer(NamedTuple):
    """What Slurm said when it was asked for the jobs of some chains."""

    at: str  # just before; UTC
    jobs: Mapping[str, Job]
    is_listed: bool  # squeue has answered
    problems: Sequence[str]  # of calls that failed


class Jobs(NamedTuple):
    """The newest job of each stage of a chain, and what Slurm knows of it."""

    ids: Mapping[str, str]
    known: Mapping[str, Job]
    is_whole: bool  # a job that is not known is gone; else Slurm has not told of all of them


def find(chains: Sequence[Written]) -> tuple[list[Jobs], Sequence[str]]:
    """The jobs of each chain, and what to tell about calls that failed."""
    answer = ask(chains)
    return [matched(chain, answer) for chain in chains], answer.problems


def ask(chains: Sequence[Written]) -> Answer:
    """squeue is asked once for all chains; sacct too, for the jobs that slurmctld has forgotten."""
    at = state.now()
    if not shutil.which("squeue"):
        is_open = any(chain.records[stage]["status"] != "done" for chain in chains for stage in _last(chain))
        return Answer(at, {}, False, ["no squeue here: what Slurm's jobs do is not known"] if is_open else [])
    listed: dict[str, Job] = {}
    is_listed, problems = True, []
    try:
        listed = {job.id: job for job in scheduler.listed("-t", "all")}
    except EnvironmentProblem as error:
        is_listed = False
        # else there is a squeue, but perhaps no Slurm
        problems += [str(error)] if any(chain.is_used for chain in chains) else []
    ended = {job for chain in chains for job in _ids(chain, listed).values()} - listed.keys()
    try:
        listed |= {job.id: job for job in scheduler.accounted(sorted(ended))} if ended else {}
    except EnvironmentProblem as error:
        problems.append(str(error))
    return Answer(at, listed, is_listed, list(dict.fromkeys(problems)))


def matched(written: Written, answer: Answer) -> Jobs:
    """The jobs of a chain, by its files and by what Slurm said."""
    ids, alive = _ids(written, answer.jobs), _alive(written, answer.jobs)
    its = {stage: answer.jobs.get(job) for stage, job in ids.items()}
    known = {stage: job for stage, job in its.items() if job and _is_it(written, stage, job, alive)}
    return Jobs(ids, known, not answer.problems)


def combined(old: Answer, new: Answer) -> Answer:
    """What is known when a call for `new` has failed: what that did not tell is still as in `old`.

    But a job that squeue does not list any more has ended: its marker says how, or sacct when it answers again.
    """
    kept = {job.id: job for job in old.jobs.values() if job.state in FINAL or not new.is_listed}
    is_first = bool(new.jobs) and old.at > new.at  # of sacct, before squeue has ever answered
    return Answer(new.at if new.is_listed or is_first else old.at, {**kept, **new.jobs}, new.is_listed, new.problems)


def since(written: Written, answer: Answer) -> tuple[Jobs, bool]:
    """The chain's jobs by Slurm's last answer and what the files say since; whether nothing is left to ask."""
    jobs = matched(written, answer)
    now, is_current = dict(jobs.known), jobs.is_whole or answer.is_listed  # squeue lists all that go on
    for stage, job in jobs.ids.items():
        record, entry = written.records[stage], written.submitted.get(stage, {})
        if record.get("job_id") == job and max(record["started"], record["ended"] or "") >= answer.at:
            now.pop(stage, None)  # the marker says how it ended
            if record["status"] == "running":
                now[stage] = Job(job, "RUNNING", "", record["host"], "", "")
        elif entry.get("job_id") == job and entry["submitted"] >= answer.at:
            now[stage] = Job(job, "PENDING", "new", "", "", "")
        else:
            continue
        is_current = is_current and record["status"] == "done"
    return Jobs(jobs.ids, now, jobs.is_whole), is_current


def _ids(written: Written, listed: Mapping[str, Job]) -> dict[str, str]:
    return _last(written) | _alive(written, listed)


def _alive(written: Written, listed: Mapping[str, Job]) -> dict[str, str]:
    return {
        job.stage: job.id for job in tagged.own(written, [job for job in listed.values() if job.state not in FINAL])
    }


def _last(written: Written) -> dict[str, str]:
    """Stage -> the launcher's last job, or that of a plain sbatch which began since."""
    ids = {}
    for stage, record in written.records.items():
        entry = written.submitted.get(stage, {"job_id": None})
        if entry["job_id"] and entry["submitted"] >= record.get("started", ""):
            ids[stage] = entry["job_id"]
        elif record.get("slurm"):
            ids[stage] = record["job_id"]
    return ids


def _is_it(written: Written, stage: str, job: Job, alive: Mapping[str, str]) -> bool:
    """Whether the job of the stage's id is the stage's: a controller that lost its state gives ids again.

    One that never began must also have our name.
    """
    ours = alive.get(stage), written.records[stage].get("job_id")
    return job.id in ours or job.name == tagged.job_name(written.chain, stage)
