"""One attempt at a time writes to a run directory, on one node and across nodes.

The claim of an attempt is the file `.claim_<n>.json` with the highest n, locked (`flock`) while its owner lives.
Taking over is making the next n, which a hard link lets only one do, then deleting the ones before. By that an
attempt on a lost or frozen node, which was taken for dead and comes back, finds out: see `check`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from utils import env, paths, slurm
from utils.errors import EnvironmentProblem, InputError
from utils.paths import RunDir


@dataclass(frozen=True)
class Claim:
    host: str
    pid: int
    job_id: str
    slurm: bool  # else job_id is the id of a process on host
    step: str
    restarts: int
    token: str

    def __str__(self) -> str:
        job = f"job {self.job_id}{f', restart {self.restarts},' if self.restarts else ''} on " if self.slurm else ""
        return f"{job}{self.host} (pid {self.pid})"


_held: dict[Path, tuple[Path, Claim]] = {}  # run directory -> this process's claim


@contextlib.contextmanager
def owned(run_dir: RunDir) -> Iterator[None]:
    """Claim the run directory for this attempt; make it, if need be. For rank 0 only; may be nested.

    Raises: InputError when another attempt is at work there; EnvironmentProblem when the directory is not ours
    alone, when Slurm has to be asked and does not answer, or when this attempt is the one that was replaced.
    """
    key = run_dir.path.resolve()
    if key in _held:
        yield
        return
    paths.make_private(run_dir.path)
    mine = Claim(
        host=socket.gethostname(),
        pid=os.getpid(),
        job_id=env.job_id(),
        slurm=env.in_slurm(),
        step=env.step_id(),
        restarts=env.restarts(),
        token=secrets.token_hex(16),
    )
    with contextlib.ExitStack() as stack:
        while not (file := _next(run_dir, mine, stack)):
            pass  # another claimed or released it in between
        _held[key] = file, mine
        for left in run_dir.path.rglob(".*.tmp"):  # by attempts that were killed while they wrote
            if left.parent != run_dir.logs:  # where other ranks of this attempt write already
                left.unlink(missing_ok=True)
        try:
            yield
        finally:
            del _held[key]
            if _read(file) == mine:
                file.unlink(missing_ok=True)


def check(run_dir: RunDir) -> None:
    """Raise EnvironmentProblem when another attempt has taken over the run that this process claimed."""
    held = _held.get(run_dir.path.resolve())
    if held and _read(held[0]) != held[1]:
        newest = _newest(run_dir)
        by = f" by {_read(newest)}" if newest else ""
        raise EnvironmentProblem(f"{run_dir.path}: this run was taken over{by}; this attempt stops and writes no more")


def _next(run_dir: RunDir, mine: Claim, stack: contextlib.ExitStack) -> Path | None:
    """Claim the run if nobody else has it. None: it has to be looked at again. Raises: see `owned`."""
    newest = _newest(run_dir)
    if newest:
        theirs = _read(newest)
        if theirs is None:
            return None
        _check_over(newest, theirs, mine)
    file = run_dir.claim(_number(newest) + 1 if newest else 1)
    descriptor, temporary = tempfile.mkstemp(dir=run_dir.path, prefix=".claim_", suffix=".tmp")
    stack.callback(os.close, descriptor)  # and with it, the lock
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, json.dumps(asdict(mine)).encode())
    os.fsync(descriptor)
    try:
        os.link(temporary, file)
    except (FileExistsError, FileNotFoundError):
        return None
    finally:
        Path(temporary).unlink(missing_ok=True)
    if _newest(run_dir) != file:  # somebody looked before an earlier claim was released
        file.unlink(missing_ok=True)
        return None
    for old in run_dir.path.glob(".claim_*.json"):
        if old != file:
            old.unlink(missing_ok=True)
    return file


def _check_over(file: Path, theirs: Claim, mine: Claim) -> None:
    """Return if the attempt that has the run is over. Raises: see `owned`."""
    running, ended = f"{file.parent}: running already: {theirs}", f"if that process has ended, remove {file}"
    if mine.slurm and theirs.slurm and mine.job_id == theirs.job_id and mine.restarts != theirs.restarts:
        if mine.restarts < theirs.restarts:
            raise EnvironmentProblem(f"{running}; Slurm has requeued this job since")
    elif theirs.host == mine.host:
        if _lives(file, theirs.pid):
            raise InputError(running)
    elif not theirs.slurm:
        raise InputError(f"{running}; {ended}")
    else:
        try:
            lives = slurm.alive(theirs.job_id)
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"{running}, or Slurm would say no: {error}; {ended}") from None
        if lives:
            raise InputError(running)


def _lives(file: Path, pid: int) -> bool:
    """Whether a process of this node holds the claim; its loader workers can keep the lock for seconds after it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError), open(file) as claim:
        try:
            fcntl.flock(claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.kill(pid, 0)
            return True
    return False


def _newest(run_dir: RunDir) -> Path | None:
    return max(run_dir.path.glob(".claim_*.json"), key=_number, default=None)


def _number(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def _read(file: Path) -> Claim | None:
    """What a claim says; None when it is gone. Raises: InputError when it is no claim."""
    try:
        return Claim(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise InputError(f"{file} is damaged; remove it if nothing is running there") from None
