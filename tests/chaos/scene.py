"""What a fault is given: the chain's running job, a source of chance, and verbs that faults share."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import processes
from tests.chaos.disk import Disk
from tests.chaos.place import Job, Place, wait
from tests.chaos.processes import Process
from utils import checkpoint_files

SECONDS = 90  # within which what a fault waits for has happened


class LaterError(Exception):
    """There is nothing to hit right now."""


class WrongError(Exception):
    """What happened is not what should have."""


@dataclass
class Scene:
    place: Place
    job: Job  # the one that runs
    chance: random.Random

    def slurm(self, *words: str) -> None:
        """A Slurm command about the job. Raises: LaterError if the job has just ended."""
        done = self.place.cluster.run(*words, self.job.id)
        if done.returncode:
            raise LaterError(done.stderr.strip())

    def processes(self) -> list[Process]:
        return list(processes.of_jobs(self.place.cluster.env["SLURM_CONF"], self.job.id))

    def hit(self, choose: Callable[[list[Process]], list[Process]], number: signal.Signals) -> None:
        """Send a signal to one of the job's processes. Raises: LaterError if there is none of the kind."""
        found = choose(self.processes())
        if not found:
            raise LaterError("no such process")
        self.chance.choice(found).send(number)

    def disk(self) -> Disk:
        assert self.place.disk
        return self.place.disk

    def until(self, probe: Callable[[], object], what: str) -> None:
        """Raises: WrongError when it does not happen."""
        if not wait(probe, SECONDS):
            raise WrongError(f"not within {SECONDS} s: {what}")

    def now(self) -> Job | None:
        """The job as Slurm has it now; None when it has ended, or slurmctld does not answer."""
        return next((job for job in self.place.jobs() or () if job.id == self.job.id), None)

    def wait_until_over(self) -> None:
        """Until this attempt at the stage has ended."""

        def over() -> bool:
            jobs = self.place.jobs()
            return jobs is not None and not any(
                job.id == self.job.id and job.state in ("RUNNING", "COMPLETING") for job in jobs
            )

        self.until(over, f"the end of {self.job.stage}")

    def newest_checkpoint(self) -> Path:
        """The stage's newest of two or more. Raises: LaterError with fewer: then all could be damaged."""
        found = checkpoint_files.everything(self.place.checkpoints(self.job.stage))
        if len(found) < 2:
            raise LaterError("not two checkpoints")
        return found[-1]

    def cancel(self) -> list[str]:
        """Cancel the chain, as a user would; the stages that are not done."""
        done = self.place.run(*self.place.launcher("--cancel"))
        if done.returncode:
            raise WrongError(f"--cancel: {done.stdout}")
        self.until(lambda: self.place.jobs() == [], "the end of cancelled jobs")
        missing = [stage for stage in self.place.stages if self.place.marker(stage).get("status") != "done"]
        if not missing:
            raise LaterError("all is done")
        return missing

    def check_queue(self, stages: list[str]) -> None:
        """Raises: WrongError unless each of `stages`, or what is left of them, is in the queue once."""
        queued = [job.stage for job in self.place.jobs() or ()]
        done = [stage for stage in stages if self.place.marker(stage).get("status") == "done"]
        if queued != [stage for stage in stages if stage not in done]:
            raise WrongError(f"in the queue: {queued}, to do: {stages}, done meanwhile: {done}")
