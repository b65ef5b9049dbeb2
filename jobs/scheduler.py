"""What Slurm says about jobs. Every call ends in bounded time; states are passed on in Slurm's own words."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from utils import env
from utils.errors import EnvironmentProblem
from utils.paths import ROOT
from utils.slurm import call

PAUSES = (1, 2, 4, 8)  # seconds; with the time each command itself tries, a minute
TROUBLE = r"[Uu]nable to contact|timed out|Zero Bytes|Connection |endpoint|no answer in|temporarily unable|Socket"


@dataclass(frozen=True)
class Job:
    """A job in Slurm's words. One that only the accounting knows has no more than the first six."""

    id: str
    state: str  # PENDING, RUNNING, FAILED, ...
    reason: str  # why a pending job waits
    node: str
    elapsed: str
    name: str
    priority: str = ""
    dependency: str = ""  # what it still waits for
    comment: str = ""
    folder: str = ""  # where it was submitted


def is_trouble(error: EnvironmentProblem) -> bool:
    """Whether slurmctld did not answer, and has not said no either."""
    return bool(re.search(TROUBLE, str(error)))


class Patience:
    """Waits while slurmctld does not answer, for all of a launch together: about a minute, then no more."""

    def __init__(self) -> None:
        self._pauses = iter(PAUSES)

    def wait(self, error: EnvironmentProblem) -> None:
        """Pause before another try. Raises: `error` if that is of no use, or has not been for a minute."""
        pause = next(self._pauses, None) if is_trouble(error) else None
        if pause is None:
            raise error
        print(f"{error}; trying again in {pause} s", flush=True)
        time.sleep(pause)

    def call(self, *argv: str, text: str | None = None) -> str:
        """`call`, again and again. For what may be asked twice. Raises: EnvironmentProblem."""
        while True:
            try:
                return call(*argv, text=text)
            except EnvironmentProblem as error:
                self.wait(error)


def listed(*options: str, ask: Callable[..., str] = call) -> Iterator[Job]:
    """This user's jobs that squeue lists: those that are queued or run, with `-t all` those that ended minutes ago too.

    Raises: EnvironmentProblem if squeue does not answer.
    """
    user = str(os.getuid())
    for line in ask("squeue", "-h", "-u", user, *options, "-o", "%A|%T|%r|%N|%M|%j|%Q|%E|%k|%Z").splitlines():
        if line.count("|") < 9:  # of a comment with a line break in it, which none of ours has
            continue
        job, state, reason, node, elapsed, name, priority, dependency, rest = line.split("|", 8)
        comment, _, folder = rest.rpartition("|")
        yield Job(job, state, reason, node, elapsed, name, priority, dependency, comment, folder)


def accounted(ids: Collection[str]) -> Iterator[Job]:
    """Those of the jobs that sacct knows, where there is accounting. Raises: EnvironmentProblem."""
    fields = "JobIDRaw,State,ExitCode,NodeList,Elapsed,JobName"
    try:
        answer = call("sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", fields)
    except EnvironmentProblem as error:
        if "accounting storage is disabled" not in str(error):
            raise
        return
    for line in answer.splitlines():
        job, state, *rest = line.split("|", 5)
        yield Job(job, state.split()[0], *rest)  # CANCELLED by 1000


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
