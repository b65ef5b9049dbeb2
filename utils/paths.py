"""Every path the project reads or writes by itself, derived here and nowhere else."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from utils.errors import EnvironmentProblem, InputError

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
CHAIN_FILE = ROOT / "jobs" / "chain.yaml"
SHARED = ("archives", "labels", "staged", "submitted")  # folders of a chain beside its stages
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_name(name: str, what: str = "name") -> str:
    """Return `name` if it is safe in a path, a job name and a shell. Raises: InputError."""
    if not NAME.fullmatch(name) or set(name) == {"."}:
        raise InputError(f"{what} {name!r}: use 1 to 64 of A-Z a-z 0-9 . _ -")
    return name


class Below:
    """A path in its owner's directory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: RunDir | ChainDir, _: type) -> Path:
        return owner.path / self.name


@dataclass(frozen=True)
class RunDir:
    """One stage's directory: `runs/<chain>/<stage>/`."""

    path: Path
    url: str | None = None  # where it is kept too, see utils/mirror.py

    @classmethod
    def of(cls, text: str) -> RunDir:
        """The run directory of a configuration; one with a URL is worked on under `runs/`."""
        if "://" not in text:
            return cls(Path(text))
        from utils import storage  # not for --help

        file = storage.local(text)
        name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', text)}.{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return cls(RUNS / ".remote" / name / "run", text) if file is None else cls(file)

    config = Below("config.yaml")
    hyperparam = Below("hyperparam.csv")  # the same, a key a line
    metrics = Below("metrics.jsonl")
    train_log = Below("train_log.csv")  # of the metrics, an epoch a line
    tensorboard = Below("tensorboard")  # see utils/events.py
    times = Below("times")  # see `attempt`
    checkpoints = Below("checkpoints")
    logs = Below("logs")
    state = Below("state.json")
    state_lock = Below(".state.lock")  # held by a rank that changes the marker
    room = Below(".room")  # space for the marker's last words, should the disk be full then
    backbone = Below("backbone.pth")  # the exported query encoder of a pretraining stage
    report_json = Below("metrics.json")
    detections = Below("detections.npz")

    def claim(self, number: int) -> Path:
        """Who may write here, see utils/run_lock.py."""
        return self.path / f".claim_{number}.json"

    def label_index(self, split: str) -> Path:
        """The cached label index of one split, shared by the stages of a chain."""
        return self.path.parent / "labels" / f"{split}.index"

    @property
    def archives(self) -> Path:
        """Which archives the stages of a chain were given: a file with the sha256 of each."""
        return self.path.parent / "archives"

    def attempt(self, job_id: str, restarts: int, began: float) -> Path:
        """What one attempt, begun at that Unix time, has spent its time on; see utils/timeline.py."""
        return self.times / f"{job_id}_{restarts}_{began:.2f}.json"

    def rank_log(self, job_id: str, restarts: int, rank: int) -> Path:
        return self.logs / f"{job_id}_{restarts}_rank{rank}.log"

    def rendezvous(self, job_id: str, step: str, restarts: int) -> Path:
        """Where rank 0 of one job step tells the other ranks its address."""
        return self.logs / f".rendezvous_{job_id}.{step}.{restarts}.json"

    def report(self, job_id: str) -> Path:
        """The evaluation report; `eval_<jobid>.err` and `metrics.json` lie beside it."""
        return self.path / f"eval_{job_id}.out"


@dataclass(frozen=True)
class ChainDir:
    """One chain's directory: `runs/<chain>/`."""

    path: Path

    @classmethod
    def named(cls, name: str) -> ChainDir:
        return cls(RUNS / check_name(name, "chain name"))

    def stage(self, stage: str) -> RunDir:
        if stage in SHARED:
            raise InputError(f"stage name {stage!r}: the chain's directory has a folder of that name")
        return RunDir(self.path / check_name(stage, "stage name"))

    jobs = Below("jobs.json")  # what the launcher submitted: stage -> job id
    submitted = Below("submitted")  # scripts and output of the jobs the launcher submitted
    page = Below("report.html")  # about the whole chain
    lock = Below(".lock")  # held by a launcher while it submits or runs stages


def chains() -> list[str]:
    """The names of the chains that have a directory."""
    return [path.name for path in RUNS.glob("*") if path.is_dir() and NAME.fullmatch(path.name) and path.name[0] != "."]


def node_disk() -> Path | None:
    """The node's own disk: `SLURM_TMPDIR`, which many sites set per job, or our `RELAY_SCRATCH` of `slurm/site.sh`."""
    value = os.environ.get("SLURM_TMPDIR") or os.environ.get("RELAY_SCRATCH")
    return Path(os.path.abspath(value)) if value else None


def staging_root(run_dir: RunDir) -> Path:
    """Where archives are copied or unpacked, and indexed: the node's own disk, or the chain's directory."""
    disk = node_disk()
    return disk / "relay" if disk else run_dir.path.parent / "staged"


def make_private(folder: Path) -> None:
    """Make `folder`, and what is missing above it, for this user alone; or check that others cannot write to it.

    Raises: EnvironmentProblem when it cannot be made, is not a real folder of this user, or can be changed by
    others. The folder above must be closed to them as well, or sticky like /tmp: else they could exchange it.
    """
    folder = Path(os.path.abspath(folder))
    for path in reversed((folder, *folder.parents)):
        if not os.path.lexists(path):
            try:
                path.mkdir(mode=0o700, exist_ok=True)  # other ranks may be here too
            except OSError as error:
                raise EnvironmentProblem(f"{path}: cannot be made: {error.strerror}") from None
    found, above = folder.lstat(), folder.parent.stat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise EnvironmentProblem(f"{folder}: must be a real folder of this user; remove it or name another")
    if found.st_mode & OTHERS_WRITE:
        raise EnvironmentProblem(f"{folder}: others can write there; use chmod go-w, or name another")
    is_sticky = above.st_mode & stat.S_ISVTX and above.st_uid in (0, os.geteuid())  # its owner can rename all in it
    if above.st_mode & OTHERS_WRITE and not is_sticky:
        raise EnvironmentProblem(f"{folder}: others can exchange it; use chmod go-w {folder.parent}, or name another")


def set_aside(path: Path) -> Path:
    """Rename `path` to the first free `<name>.1`, `<name>.2`, ...: work is never deleted. Returns the new path."""
    return path.rename(free_name(path))


def is_set_aside(name: str) -> bool:
    """Whether a folder is one that `set_aside` made."""
    return name.rpartition(".")[2].isdecimal()


def free_name(path: Path) -> Path:
    """The first of `<name>.1`, `<name>.2`, ... that does not exist."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(target for target in names if not target.exists())
