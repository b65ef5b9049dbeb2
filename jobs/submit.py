"""Stages as Slurm jobs, through submitit, with the resources in the #SBATCH headers of slurm/*.slurm."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from jobs import scheduler, state, worker
from jobs.plan import Resources, Step
from jobs.stages import Chain
from utils import files, paths
from utils.errors import EnvironmentProblem, InputError
from utils.paths import ROOT

OURS = {"job-name", "output", "error", "open-mode", "comment", "dependency"}  # not taken from a header


def header(script: Path) -> Resources:
    """The `#SBATCH --option` lines of a script, as sbatch reads them: up to the first command."""
    found: Resources = {}
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            found |= options(shlex.split(line.removeprefix("#SBATCH"), comments=True), str(script))
        elif line.strip() and not line.startswith("#"):
            break
    return found


def options(words: Sequence[str], origin: str) -> Resources:
    """`--a=1`, `--a 1` and `--flag` words as a dict. Raises: InputError for anything else."""
    found: Resources = {}
    key = ""
    for word in words:
        if match := re.fullmatch(r"--([a-z][a-z-]*)(?:=(.*))?", word):
            key = match[1]
            found[key] = True if match[2] is None else match[2]
        elif key and found[key] is True and not word.startswith("-"):
            found[key] = word
        else:
            raise InputError(f"{origin}: sbatch option {word!r}: write the long form, --name=value")
    return found


def resources(chain: Chain, stage: str, extra: Sequence[str]) -> Resources:
    """The header's options, with `extra` sbatch options over them. Raises: InputError."""
    file = chain.stages[stage].slurm
    asked = header(file) | options(extra, "--sbatch")
    for key in ("nodes", "ntasks-per-node"):
        if not str(asked.get(key, "")).isdecimal():
            raise InputError(f"{file}: needs #SBATCH --{key}=N with a plain number")
    if "time" not in asked:
        raise InputError(f"{file}: needs #SBATCH --time=…")
    return asked


def ranks(asked: Resources) -> int:
    """How many processes a job has."""
    return int(asked["nodes"]) * int(asked["ntasks-per-node"])


def minutes(limit: str) -> int:
    """Slurm's time limit (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in minutes, rounded up. Raises: InputError."""
    days, dash, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        raise InputError(f"time={limit}: write minutes, hours:minutes:seconds or days-hours")
    units = (60, 1, 1 / 60) if dash or len(parts) == 3 else (1, 1 / 60)
    rest = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return int(days or 0) * 1440 + math.ceil(rest)


def executor(chain: Chain, stage: str, asked: Resources, after: Sequence[str]) -> submitit.SlurmExecutor:
    """submitit's executor for a stage that starts `after` other jobs; it writes nothing before it submits."""
    made = submitit.SlurmExecutor(chain.dir.submitted, python='"${relay_python[@]}"')
    given = {key.replace("-", "_"): value for key, value in asked.items() if key not in OURS}
    made.update_parameters(
        job_name=scheduler.job_name(chain, stage),
        comment=scheduler.tag(chain, stage),
        dependency=":".join(["afterok", *after]) if after else None,
        stderr_to_stdout=True,
        wckey=None,
        nodes=int(asked["nodes"]),
        ntasks_per_node=int(asked["ntasks-per-node"]),
        time=minutes(str(asked["time"])),
        additional_parameters={"kill_on_invalid_dep": "yes", **given},  # sbatch gets the header's own words
        srun_args=["--kill-on-bad-exit=1"],
        setup=[
            f'export RELAY_PYTHON="${{RELAY_PYTHON:-{sys.executable}}}"',
            f"source {shlex.quote(str(ROOT / 'slurm' / 'common.sh'))}",
        ],
    )
    return made


def script(made: submitit.SlurmExecutor) -> str:
    """The sbatch script submitit writes for a job."""
    return made._make_submission_file_text(made._submitit_command_str, "")


def refusals(chain: Chain, asked: Mapping[str, Resources]) -> list[str]:
    """What sbatch has against the stages' jobs, in its words."""
    stages: dict[str, list[str]] = {}
    for stage, options in asked.items():
        try:
            scheduler.call("sbatch", "--test-only", text=script(executor(chain, stage, options, [])))
        except EnvironmentProblem as error:
            stages.setdefault(str(error), []).append(stage)
    return [f"{', '.join(names)}: {text}" for text, names in stages.items()]


def _make_private(folder: Path) -> None:
    """A folder for pickled calls: who can write there can exchange them. Raises: EnvironmentProblem."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise EnvironmentProblem(f"{folder}: others can write there; chmod go-w it, or use another --name")


def kept(steps: Sequence[Step], live: Mapping[str, str]) -> dict[str, str]:
    """Stage -> its `live` job, if that may stay: it waits for no job that will be another one."""
    found: dict[str, str] = {}
    anew: set[str] = set()
    for step in steps:
        if step.action != "skip" and step.stage in live and not anew.intersection(step.needs):
            found[step.stage] = live[step.stage]
        elif step.action != "skip":
            anew.add(step.stage)
    return found


def submit(
    chain: Chain, steps: Sequence[Step], asked: Mapping[str, Resources], live: Mapping[str, str]
) -> list[list[str]]:
    """Queue the steps, each after those of its parents that are not done; `live` jobs are kept where they can be.

    `jobs.json` is written after every submission: a launcher that dies half-way is simply run again.
    Returns the rows of a table.
    """
    _make_private(chain.dir.submitted)
    rows = [["stage", "job", "after", "log"]]
    jobs: dict[str, str] = {}
    keep = kept(steps, live)
    for step in steps:
        stage = step.stage
        if step.action == "skip":
            rows.append([stage, "done", "", ""])
            continue
        if stage in keep:
            jobs[stage] = keep[stage]
            known = scheduler.configuration(chain, stage, keep[stage])
            rows.append([stage, f"{keep[stage]} (kept{'' if known else ', its configuration is unknown'})", "", ""])
            continue
        if stage in live:  # it waits for a job that is gone
            scheduler.cancel([live[stage]])
        if step.action == "again":
            paths.set_aside(chain.run_dir(stage).path)
        after = [jobs[parent] for parent in step.needs if parent in jobs]
        task = worker.Task(chain.worker_words(stage, step.words))
        try:
            job = executor(chain, stage, asked[stage], after).submit(task)
        except FailedJobError as error:
            done = ", ".join(f"{name} (job {job})" for name, job in jobs.items()) or "nothing"
            raise EnvironmentProblem(f"{stage}: sbatch: {error}; queued before it: {done}") from None
        jobs[stage] = job.job_id
        log = str(job.paths.stdout)
        entry = {"job_id": job.job_id, "submitted": state.now(), "log": log, "config": dict(step.config)}
        files.write_json(chain.dir.jobs, {**scheduler.submitted(chain), stage: entry})
        rows.append([stage, job.job_id, " ".join(after), log])
    return rows
