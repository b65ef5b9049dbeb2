"""The processes of a job on this machine, by what they are."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    argv: tuple[str, ...]
    rank: str  # SLURM_PROCID

    def is_program(self) -> bool:
        return Path(self.argv[0]).name.startswith("python") and "jobs.worker" in self.argv

    def send(self, number: signal.Signals) -> None:
        send(self.pid, number)


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def of_jobs(slurm_conf: str, job: str | None = None) -> Iterator[Process]:
    """Every process that a job of the cluster has started; or that one of them has."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            values = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            environ = dict(value.partition("=")[::2] for value in values)
            argv = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            of = environ.get("SLURM_JOB_ID")
            if environ.get("SLURM_CONF") == slurm_conf and argv and of and of == (job or of):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                yield Process(int(folder.name), parent, tuple(argv), environ.get("SLURM_PROCID", ""))


def step_daemons(found: list[Process]) -> list[int]:
    """The processes of slurmd that look after a job's steps: the parents of the job's own."""
    pids = {process.parent for process in found} - {process.pid for process in found}
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd")]


def ranks(found: list[Process]) -> list[Process]:
    """The ranks' programs; their loader processes have the same command line."""
    programs = {process.pid for process in found if process.is_program()}
    return [process for process in found if process.pid in programs and process.parent not in programs]


def workers(found: list[Process]) -> list[Process]:
    """The ranks' loader processes."""
    programs = {process.pid for process in found if process.is_program()}
    return [process for process in found if process.pid in programs and process.parent in programs]


def srun(found: list[Process]) -> list[Process]:
    """It has a helper process of the same name."""
    named = [process for process in found if Path(process.argv[0]).name == "srun"]
    pids = {process.pid for process in named}
    return [process for process in named if process.parent not in pids]


def batch_shell(found: list[Process]) -> list[Process]:
    """The shell that runs the batch script; its subshells only wait for srun and look the same."""
    shells = [process for process in found if process.argv[-1].endswith("slurm_script")]
    pids = {process.pid for process in shells}
    return [process for process in shells if process.parent not in pids]
