"""Slurm's commands. Every call ends in bounded time."""

from __future__ import annotations

import subprocess

from utils.errors import EnvironmentProblem

TIMEOUT = 30  # seconds
# A state that is not among these, also one that a later Slurm invents, is a living job's.
FINAL = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
FINAL |= {"OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}


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


def state(job: str) -> str:
    """PENDING, RUNNING, COMPLETED, ...; empty for a job that Slurm does not know (any more).

    Raises: EnvironmentProblem if squeue does not answer.
    """
    try:
        return call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()
    except EnvironmentProblem as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def alive(job: str) -> bool:
    """Whether a job waits, runs or ends. Raises: EnvironmentProblem if squeue does not answer."""
    return state(job) not in {"", *FINAL}
