"""What Slurm says about jobs. Every call ends in bounded time; states are passed on in Slurm's own words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import state
from jobs.stages import Chain
from utils import env
from utils.errors import EnvironmentProblem
from utils.paths import ROOT

TIMEOUT = 30  # seconds
# A state that is not among these, also one that a later Slurm invents, is a living job's.
FINAL = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
FINAL |= {"OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}


@dataclass(frozen=True)
class Job:
    state: str  # PENDING, RUNNING, FAILED, ...
    reason: str  # why a pending job waits
    node: str
    elapsed: str
    name: str


def call(*argv: str, text: str | None = None) -> str:
    """The output of one Slurm command, `text` being its input. Raises: EnvironmentProblem in its words."""
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError:
        raise EnvironmentProblem(f"{argv[0]}: no such program") from None
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(f"{argv[0]}: no answer in {TIMEOUT} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise EnvironmentProblem(said or f"{argv[0]}: exit code {done.returncode}")
    return done.stdout


def lookup(ids: Collection[str]) -> tuple[dict[str, Job], list[str]]:
    """The jobs that Slurm knows of `ids`, and what to tell about calls that failed.

    squeue knows jobs that live or ended minutes ago; sacct, where there is accounting, all others.
    """
    found: dict[str, Job] = {}
    notes: list[str] = []
    if not ids or not shutil.which("squeue"):
        return found, notes
    try:
        _read(call("squeue", "-h", "-t", "all", "-j", ",".join(ids), "-o", "%i|%T|%r|%N|%M|%j"), found)
    except EnvironmentProblem as error:
        if "Invalid job id" not in str(error):  # what it says to ids of which none is known any more
            notes.append(str(error))
    if missing := [job for job in ids if job not in found]:
        fields = "JobIDRaw,State,ExitCode,NodeList,Elapsed,JobName"
        try:
            _read(call("sacct", "-n", "-P", "-X", "-j", ",".join(missing), "-o", fields), found)
        except EnvironmentProblem as error:
            if "accounting storage is disabled" not in str(error):
                notes.append(str(error))
    return found, notes


def _read(lines: str, found: dict[str, Job]) -> None:
    for line in lines.splitlines():
        job, state, reason, node, elapsed, name = line.split("|", 5)
        found[job] = Job(state.split()[0], reason, node.strip("()"), elapsed, name)  # CANCELLED by 1000


def submitted(chain: Chain) -> dict[str, dict[str, Any]]:
    """What the launcher wrote down: stage -> job_id, submitted (UTC), log, config."""
    try:
        return json.loads(chain.dir.jobs.read_text())
    except FileNotFoundError:
        return {}


def job_name(chain: Chain, stage: str) -> str:
    return f"{chain.name}-{stage}"


def tag(chain: Chain, stage: str) -> str:
    """The comment of a job, by which it is found when nobody wrote its id down; as in slurm/chain.slurm."""
    return f"relay:{chain.name}:{stage}"


def is_used(chain: Chain) -> bool:
    """Whether anything of the chain has been a Slurm job, as far as its own files know."""
    return bool(submitted(chain)) or any(state.read(chain, stage).get("slurm") for stage in chain.stages)


def queued(chain: Chain) -> list[tuple[str, str]]:
    """(stage, job id) of every job that squeue lists, queued or running, the newest last.

    Those with the chain's tag that were submitted in this checkout, and those that have marked a stage as running.
    Raises: EnvironmentProblem if squeue does not answer.
    """
    if not shutil.which("squeue"):
        return []
    tags = {tag(chain, stage): stage for stage in chain.stages}
    running = {}
    for stage in chain.stages:
        record = state.read(chain, stage)
        if record.get("slurm") and not record["ended"]:
            running[record["job_id"]] = stage
    found = []
    for line in call("squeue", "-h", "-u", str(os.getuid()), "-o", "%A|%k|%Z").splitlines():
        job, _, rest = line.partition("|")
        comment, _, folder = rest.rpartition("|")
        owner = running.get(job) or (tags.get(comment) if Path(folder).resolve() == ROOT else None)
        if owner:
            found.append((owner, job))
    return sorted(found, key=lambda item: int(item[1]))


def configuration(chain: Chain, stage: str, job: str) -> Mapping[str, Any] | None:
    """The configuration a job of the stage was submitted with; None if nobody has written it down."""
    for record in (submitted(chain).get(stage, {}), state.read(chain, stage)):
        if record.get("job_id") == job:
            return record.get("config")
    return None


def find(chain: Chain, records: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, Job], list[str]]:
    """(stage -> id of its newest job, stage -> what Slurm knows of it, calls that failed).

    The newest job is one that is queued or runs, else the launcher's last one, or that of a plain sbatch
    which began since.
    """
    entries = submitted(chain)
    ids: dict[str, str] = {}
    for stage, record in records.items():
        if stage in entries and entries[stage]["submitted"] >= record.get("started", ""):
            ids[stage] = entries[stage]["job_id"]
        elif record.get("slurm"):
            ids[stage] = record["job_id"]
    alive: dict[str, str] = {}
    problems: list[str] = []
    try:
        alive = dict(queued(chain))
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


def cancel(ids: Sequence[str]) -> None:
    call("scancel", *ids)


def prepare_environment(options: Collection[str]) -> None:
    """Make this process's environment that of a login node where slurm/site.sh was sourced, for sbatch.

    SBATCH_ variables win over a script's header; those of `options` that were given by hand are left out.
    Inside a job, that job's variables would get mixed with what the stages ask for.
    """
    if env.in_slurm():
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del os.environ[name]
    output = call("bash", "-c", 'source "$0" >&2 && env -0', str(ROOT / "slurm" / "site.sh"))
    variables = dict(item.partition("=")[::2] for item in output.split("\0"))
    by_hand = tuple("SBATCH_" + option.replace("-", "_").upper() for option in options)
    for name, value in variables.items():
        if name.startswith("SBATCH_"):
            os.environ[name] = value
        if name.startswith(by_hand):
            os.environ.pop(name, None)
