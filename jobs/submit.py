"""What a stage asks Slurm for: the #SBATCH header of its slurm/*.slurm, as a job of submitit."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import tagged
from jobs.plan import Resources
from jobs.scheduler import Patience, is_trouble
from jobs.stages import Chain
from utils.errors import EnvironmentProblem, InputError
from utils.paths import ROOT

if TYPE_CHECKING:
    import submitit

OURS = {"job-name", "output", "error", "open-mode", "comment", "dependency", "hold"}  # not taken from a header
EARLY = 60  # seconds by which Slurm may send a job's signal too early


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
    if "array" in asked:
        raise InputError(f"{file}: array={asked['array']}: a stage is one job; for several chains use several --name")
    limit, (name, lead) = minutes(str(asked["time"])) * 60, notice(str(asked.get("signal", "USR2@0")))
    if name not in ("USR1", "USR2", "TERM") or lead >= limit:
        raise InputError(
            f"{file}: signal={asked['signal']}: needs USR2@SECONDS, and fewer than the {limit} of its time"
        )
    if lead + EARLY >= limit:
        print(
            f"{stage}: of its {limit} s the last {lead} to {lead + EARLY} are for saving: it may hardly begin to train"
        )
    return asked


def notice(signal: str) -> tuple[str, int]:
    """sbatch's --signal=[{R|B}:]NAME[@SECONDS] as name and seconds."""
    name, _, seconds = signal.rpartition(":")[2].partition("@")
    return name.upper().removeprefix("SIG"), int(seconds) if seconds.isdecimal() else 60


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


def executor(
    chain: Chain, stage: str, asked: Resources, after: Sequence[str], token: str = "0"
) -> submitit.SlurmExecutor:
    """submitit's executor for a stage that starts `after` other jobs; it writes nothing before it submits.

    The job is held: jobs/enqueue.py releases a chain when all of it is there.
    """
    import submitit  # as long as all other imports of a launch together; --help and --status do without

    made = submitit.SlurmExecutor(chain.dir.submitted)
    given = {key.replace("-", "_"): value for key, value in asked.items() if key not in OURS}
    made.update_parameters(
        job_name=tagged.job_name(chain, stage),
        comment=tagged.tag(chain, stage, token, "hold" in asked),
        dependency=":".join(["afterok", *after]) if after else None,
        stderr_to_stdout=True,
        wckey=None,
        nodes=int(asked["nodes"]),
        ntasks_per_node=int(asked["ntasks-per-node"]),
        time=minutes(str(asked["time"])),
        # sbatch gets the header's own words
        additional_parameters={"kill_on_invalid_dep": "yes", **given, "hold": True},
        use_srun=False,  # run_stage does
        setup=[
            f'[[ -n "${{RELAY_PYTHON:-}}" ]] || export RELAY_PYTHON={shlex.quote(sys.executable)}',
            f"source {shlex.quote(str(ROOT / 'slurm' / 'common.sh'))}",
        ],
    )
    return made


def command(chain: Chain, stage: str, words: Sequence[str]) -> str:
    """What a job runs: as in slurm/*.slurm."""
    return f"run_stage {shlex.join(chain.worker_words(stage, words))}"


def script(made: submitit.SlurmExecutor, command: str) -> str:
    """The sbatch script submitit writes for a job."""
    return made._make_submission_file_text(command, "")


def refusals(chain: Chain, asked: Mapping[str, Resources], patience: Patience) -> list[str]:
    """What Slurm has against the stages' jobs, in its words. Raises: EnvironmentProblem if it does not answer."""
    alike: dict[frozenset[tuple[str, str | bool]], list[str]] = {}  # the rounds usually ask for the same
    for stage, options in asked.items():
        theirs = frozenset(item for item in options.items() if item[0] not in OURS)
        alike.setdefault(theirs, []).append(stage)
    stages: dict[str, list[str]] = {}
    for names in alike.values():
        text = script(executor(chain, names[0], asked[names[0]], []), command(chain, names[0], []))
        try:
            patience.call("sbatch", "--test-only", text=text)
        except EnvironmentProblem as error:
            if is_trouble(error):
                raise
            stages.setdefault(str(error), []).extend(names)
    settings = patience.call("scontrol", "show", "config")
    match = re.search(r"^MaxJobCount\s*=\s*(\d+)", settings, re.MULTILINE)
    present = len(patience.call("squeue", "-h", "-r", "-o", "%A").splitlines())
    problems = [f"{', '.join(names)}: {text}" for text, names in stages.items()]
    if match and present + len(asked) > int(match[1]):
        problems.append(f"Slurm takes {match[1]} jobs in all (MaxJobCount) and has {present}; {len(asked)} do not fit")
    return problems
