"""Putting a chain into Slurm's queue, whatever happens meanwhile to the launcher, to slurmctld, or by another launcher.

Every job is held until all are there. Before each submission Slurm is asked which of the chain's jobs it has, so that
what was lost is added and what is there is kept; nothing rests on ids, which a crashed slurmctld gives again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence

from jobs import state, store, submit, tagged
from jobs.plan import Resources, Step
from jobs.scheduler import Patience
from jobs.stages import Chain
from jobs.tagged import Queued
from utils import files, paths
from utils.errors import EnvironmentProblem

PER_SECOND = 5  # submissions; sites limit their rate
ROUNDS = 3  # submissions of one stage before something else must be wrong


def kept(steps: Sequence[Step], live: Sequence[Queued]) -> dict[str, Queued]:
    """Stage -> its job of `live`, if that may stay: it waits for no job that is, or will be, another one."""
    found: dict[str, Queued] = {}
    anew: set[str] = set()
    for step in steps:
        if step.action == "skip":
            continue
        parents = _ids(found, step)
        fitting = [job for job in live if job.stage == step.stage and job.waits_for(parents)]
        if fitting and not anew.intersection(step.needs):
            found[step.stage] = fitting[0]
        else:
            anew.add(step.stage)
    return found


def _ids(jobs: Mapping[str, Queued], step: Step) -> list[str]:
    return [jobs[parent].id for parent in step.needs if parent in jobs]


def submit_all(
    chain: Chain, steps: Sequence[Step], asked: Mapping[str, Resources], patience: Patience
) -> list[list[str]]:
    """Queue the steps, each after those of its parents that are not done; jobs that are there are kept if they can be.

    Returns the rows of a table. Raises: EnvironmentProblem naming the jobs that are in the queue.
    """
    paths.make_private(chain.dir.submitted)
    tokens = {step.stage: secrets.token_hex(4) for step in steps}
    placed: dict[str, str] = {}  # stage -> job, as far as Slurm has said
    try:
        jobs = _complete(chain, steps, asked, patience, tokens, placed)
        if held := [job.id for job in reversed(jobs.values()) if job.releasable]:  # the first of the chain last
            patience.call("scontrol", "release", ",".join(held))
    except EnvironmentProblem as error:
        listed = ", ".join(f"{stage} (job {job})" for stage, job in placed.items()) or "nothing"
        raise EnvironmentProblem(f"{error}; in the queue: {listed}; the same command again adds the rest") from None
    return [["stage", "job", "after", "log"], *(_row(chain, step, jobs, tokens) for step in steps)]


def _complete(
    chain: Chain,
    steps: Sequence[Step],
    asked: Mapping[str, Resources],
    patience: Patience,
    tokens: Mapping[str, str],
    placed: dict[str, str],
) -> dict[str, Queued]:
    """Submit what is missing until Slurm has a job for every step that is not done. Stage -> job."""
    todo = [step for step in steps if step.action != "skip"]
    earliest = time.monotonic()  # for the next submission
    for _ in range(ROUNDS * len(steps)):
        live = tagged.settled(chain, patience.call)
        jobs = kept(todo, live)
        placed |= {stage: job.id for stage, job in jobs.items()}
        todo = [step for step in todo if step.stage in jobs or not _is_done_meanwhile(chain, step)]
        _drop(todo, jobs, live, patience)
        _note_ids(chain, jobs)
        step = next((step for step in todo if step.stage not in jobs), None)
        if not step:
            return jobs
        if step.action == "again" and chain.run_dir(step.stage).path.exists():
            store.set_aside(chain, step.stage)
        time.sleep(max(0.0, earliest - time.monotonic()))
        earliest = time.monotonic() + 1 / PER_SECOND
        try:
            placed[step.stage] = _submit(chain, step, asked[step.stage], _ids(jobs, step), tokens[step.stage])
        except EnvironmentProblem as error:
            patience.wait(error)
    raise EnvironmentProblem("jobs are lost again and again; see squeue, and slurmctld's log")


def _is_done_meanwhile(chain: Chain, step: Step) -> bool:
    return step.action == "run" and state.read(chain, step.stage)["status"] == "done"


def _drop(todo: Sequence[Step], jobs: Mapping[str, Queued], live: Sequence[Queued], patience: Patience) -> None:
    """Cancel waiting jobs of these stages that are not kept: their parent is gone, or they are a second one."""
    stages, stay = {step.stage for step in todo}, {job.id for job in jobs.values()}
    if drop := [job.id for job in live if job.stage in stages and job.id not in stay and job.pending]:
        patience.call("scancel", *drop)


def _note_ids(chain: Chain, jobs: Mapping[str, Queued]) -> None:
    """Write down the ids of jobs whose submission was written down, perhaps by a launcher that was killed then."""
    entries = tagged.submitted(chain)
    for stage, job in jobs.items():
        entry = entries.get(stage)
        if job.token and entry and not entry["job_id"]:
            log = str(chain.dir.submitted / f"{job.id}_0_log.out")
            config = entry["config"] if entry["token"] == job.token else {}  # unknown: another login node's launcher
            entries[stage] = {**entry, "job_id": job.id, "token": job.token, "log": log, "config": config}
            files.write_json(chain.dir.jobs, entries)


def _submit(chain: Chain, step: Step, asked: Resources, after: Sequence[str], token: str) -> str:
    """Hand one job to sbatch, after writing down that this begins; its id. Raises: EnvironmentProblem."""
    entry = {"job_id": None, "token": token, "submitted": state.now(), "log": "", "config": dict(step.config)}
    files.write_json(chain.dir.jobs, {**tagged.submitted(chain), step.stage: entry})
    made = submit.executor(chain, step.stage, asked, after, token)
    from submitit.core.utils import FailedJobError  # as in there, not before it is needed

    try:
        return str(made._submit_command(submit.command(chain, step.stage, step.words)).job_id)
    except FailedJobError as error:
        raise EnvironmentProblem(f"{step.stage}: sbatch: {error}") from None


def _row(chain: Chain, step: Step, jobs: Mapping[str, Queued], tokens: Mapping[str, str]) -> list[str]:
    if step.stage not in jobs:
        return [step.stage, "done", "", ""]
    job = jobs[step.stage]
    if job.token == tokens[step.stage]:
        return [step.stage, job.id, " ".join(_ids(jobs, step)), tagged.submitted(chain)[step.stage]["log"]]
    known = tagged.configuration(chain, job)
    return [step.stage, f"{job.id} (kept{'' if known else ', its configuration is unknown'})", "", ""]
