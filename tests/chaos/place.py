"""Where it happens: a copy of the checkout with a little data, a cluster, and a chain in its queue."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from tests.chaos import record
from tests.chaos.disk import Disk
from tests.checkout import Checkout, Process
from tests.cluster import Cluster
from tests.labeled_set import write_set
from utils.paths import ROOT

CHAIN = "chaos"
STAGES = ("pretrain", "r1", "r2", "r3", "eval")
FILE = ("--file", "tests/chaos/chain.yaml")
RANKS = 2
SBATCH = (f"--ntasks-per-node={RANKS}", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=2G", "--time=60")
IMAGES = 40  # training pictures, with and without labels: ten steps an epoch


@dataclass(frozen=True)
class Job:
    """A job that is queued or running."""

    id: str
    stage: str
    state: str
    reason: str
    node: str


class Place(Checkout):
    """A checkout of real programs, and a chain of all `stages` or of one, with these `words` for the launcher.

    `disk` is there after `mount`, where that is allowed.
    """

    def __init__(
        self, directory: Path, cluster: Cluster, stages: Sequence[str] = STAGES, words: Sequence[str] = ()
    ) -> None:
        super().__init__(directory, cluster)
        self.cluster, self.stages, self.words = cluster, stages, words
        self.disk: Disk | None = None
        skip = shutil.ignore_patterns("__pycache__")
        for name in ("ssl_train", "detect_train", "evaluate", "tests/chaos", "tests/faults"):
            shutil.copytree(ROOT / name, self.root / name, ignore=skip)
        write_set(self.root / "data/labeled", training=IMAGES, validation=6)
        (self.root / "data/unlabeled").symlink_to(self.root / "data/labeled/training/images")

    def mount(self) -> str | None:
        """Put runs/ on a disk of its own; why that is not possible, if it is not."""
        try:
            self.disk = Disk(self.root / "runs")
        except OSError as error:
            return str(error)
        return None

    def launcher(self, *words: str) -> list[str]:
        return [sys.executable, "jobs/launch.py", *FILE, *words]

    def chain(self, *words: str) -> list[str]:
        """The command that a user gives, once and again."""
        what = ["--chain"] if self.stages == STAGES else ["--only", *self.stages]
        return self.launcher(*what, *(f"--sbatch={option}" for option in SBATCH), *self.words, *words)

    def go(self, name: str = CHAIN) -> CompletedProcess[str]:
        return self.run(*self.chain("--name", name))

    def status(self) -> str:
        queue = self.cluster.run("squeue").stdout
        return f"{self.run(*self.launcher('--status')).stdout}{queue}"

    def jobs(self, name: str = CHAIN) -> list[Job] | None:
        """The chain's jobs that are queued or running, parents first; None while slurmctld does not answer."""
        done = self.cluster.run("squeue", "-h", "-o", "%A|%j|%T|%r|%N")
        if done.returncode:
            return None
        found = []
        for line in done.stdout.splitlines():
            job, title, state, reason, node = line.split("|")
            chain, _, stage = title.rpartition("-")
            if chain == name and stage in STAGES:
                found.append(Job(job, stage, state, reason, node))
        return sorted(found, key=lambda job: STAGES.index(job.stage))

    def running(self) -> Job | None:
        return next((job for job in self.jobs() or () if job.state == "RUNNING"), None)

    def marker(self, stage: str, name: str = CHAIN) -> dict[str, Any]:
        """What the stage's state.json says; {} without one."""
        try:
            return json.loads((self.root / "runs" / name / stage / "state.json").read_text())
        except OSError:
            return {}

    def is_done(self, name: str = CHAIN) -> bool:
        return self.marker(self.stages[-1], name).get("status") == "done"

    def checkpoints(self, stage: str) -> Path:
        return self.root / "runs" / CHAIN / stage / "checkpoints"

    def lines(self, name: str = CHAIN) -> list[record.Line]:
        return list(record.lines(self.root, name))

    def leftover_files(self) -> list[Path]:
        """Temporary files that nobody will finish."""
        return [path for path in (self.root / "runs").rglob("*") if ".tmp" in path.name]


def start_cluster(directory: Path) -> Cluster:
    """Two nodes; one that is silent for six seconds is lost."""
    cluster = Cluster.start(directory, accounting=False)
    with open(cluster.directory / "slurm.conf", "a") as conf:
        conf.write("\nSlurmdTimeout=6\n")
    cluster.run("scontrol", "reconfigure")
    return cluster


def restart_slurmctld(cluster: Cluster) -> None:
    """Start it after a kill; until the nodes have answered it, it takes no job for them."""
    cluster.launch("slurmctld")
    states = ("sinfo", "-hN", "-p", "main", "-o", "%T")
    wait(lambda: re.fullmatch(r"((idle|mixed|allocated)\n)+", cluster.run(*states).stdout), 60)


def start(place: Place, *words: str) -> Process:
    """A launcher of the chain, which can be killed."""
    return place.start(*place.chain(*words))


def wait(probe: Any, seconds: float, pause: float = 0.1) -> bool:
    """Whether `probe` comes true in time."""
    end = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True
