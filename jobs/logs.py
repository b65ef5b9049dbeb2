"""`--logs STAGE`: what a stage has said, over all its restarts, and with `-f` what it goes on to say."""

from __future__ import annotations

import itertools
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import state, status, tagged
from jobs.stages import Chain
from jobs.watch import is_launched
from utils import paths
from utils.errors import InputError

PAUSE = 0.5  # seconds between two looks at the files


def print_logs(chain: Chain, stage: str, follow: bool) -> None:
    """Print rank 0's logs of a stage, oldest first, and what else tells how it failed.

    Args:
        follow: go on with what is added, also by the next attempts, until the stage is done or has failed, or has
            been stopped here with no launcher that goes on. Whether a job goes on is not asked of Slurm.

    Raises: InputError when it has no logs, unless they are waited for.
    """
    chain.stage(stage)
    printer = Printer()
    if not follow and not (files := sources(chain, stage, state.marker(chain, stage))):
        others = [name for name in chain.stages if sources(chain, name, state.marker(chain, name))]
        listed = f"there are of {', '.join(others)}" if others else "nor has another stage"
        raise InputError(f"{stage} of chain {chain.name} has no logs yet ({listed}); -f waits for them")
    if not follow:
        for file in files:
            printer.add(file, whole=True)
    else:
        _follow(chain, stage, printer)
    record = state.marker(chain, stage)
    if record["status"] != "done":
        if record["status"] == "failed" and Path(record["log"]).is_file():  # perhaps of another rank
            printer.add(Path(record["log"]), whole=True)
        for file in _printed(chain, stage, record):
            printer.rest(file)


def _follow(chain: Chain, stage: str, printer: Printer) -> None:
    """Print what is there and what comes, until the stage has ended and says no more."""
    told = ""
    while True:
        record = state.marker(chain, stage)
        remote = [file for file in printer.read if file == _remote(chain, stage)]
        files = remote or sources(chain, stage, record)  # the rest comes from the VM when all has been said
        has_ended = _has_ended(chain, stage, record)  # asked before reading: a little is said after the marker
        news = [printer.add(file) for file in files]
        if has_ended and not any(news):
            break
        now = "" if has_ended else _waits_for(record, files)
        if now and now != told:
            print(f"{stage} of chain {chain.name} {now}", file=sys.stderr, flush=True)
        told = now
        time.sleep(PAUSE)
    for file in files:
        printer.add(file, whole=True)


def _waits_for(record: Mapping[str, Any], files: Sequence[Path]) -> str:
    """Why nothing comes just now, if the stage does not run; the next attempt may."""
    if record["status"] == "preempted":
        return f"was stopped ({status.harmless(record['cause'])}); waiting for its next attempt"
    return "" if files else "has not begun; waiting"


def _has_ended(chain: Chain, stage: str, record: Mapping[str, Any]) -> bool:
    """Whether the stage's last attempt is over, and no other is queued."""
    entry = tagged.submitted(chain).get(stage)
    if entry and entry["submitted"] > record.get("started", ""):
        return False
    is_local = not record.get("slurm") and record.get("host") == socket.gethostname()
    if is_local and record["status"] == "running":
        return not status.is_alive(record)
    if is_local and record["status"] == "preempted":
        return not is_launched(chain)  # the same command would go on, but nobody has given it
    return record["status"] in ("done", "failed")


def sources(chain: Chain, stage: str, record: Mapping[str, Any]) -> list[Path]:
    """The logs that tell a stage's story, oldest first.

    They are rank 0's, one an attempt, and what a job has printed that has none yet. Those on a TPU VM come here at its
    end: until then there is what the launcher has seen.
    """
    run_dir = chain.run_dir(stage)

    def began(log: Path) -> float:
        times = [float(file.stem.rpartition("_")[2]) for file in run_dir.times.glob(f"{log.name[:-10]}_*.json")]
        return min(times, default=log.stat().st_mtime)  # one attempt at a time writes

    logs = sorted(run_dir.logs.glob("*_rank0.log"), key=began)
    jobs = {log.name.partition("_")[0] for log in logs}
    printed = _printed(chain, stage, record)
    remote = _remote(chain, stage)
    if remote in printed and all(log.stat().st_mtime < remote.stat().st_mtime for log in logs):
        return [remote]
    return [*logs, *(file for file in printed if file != remote and not jobs.intersection(file.stem.split("_")))]


def _printed(chain: Chain, stage: str, record: Mapping[str, Any]) -> list[Path]:
    """What the stage's newest jobs have printed: to Slurm, or to the launcher from a TPU VM."""
    jobs = [tagged.submitted(chain).get(stage, {}).get("job_id"), record["job_id"] if record.get("slurm") else None]
    found: list[Path] = []
    for job in dict.fromkeys(job for job in reversed(jobs) if job):
        found += [*chain.dir.submitted.glob(f"{job}_0_log.out"), *paths.RUNS.glob(f"*_{job}.out")]
    remote = _remote(chain, stage)
    return [remote] if remote.exists() and not found else found


def _remote(chain: Chain, stage: str) -> Path:
    """What the launcher has seen of the stage on TPU VMs."""
    return chain.dir.submitted / f"tpu_{stage}.log"


class Printer:
    """Prints files as they grow, each part under its file's name."""

    def __init__(self) -> None:
        self.read: dict[Path, int] = {}  # bytes of each file
        self.said: set[int] = set()  # hashes of lines
        self.last: Path | None = None  # whose name stands above

    def add(self, file: Path, whole: bool = False) -> bool:
        """Print the lines that are new, with `whole` also one that has no end yet; whether there were any."""
        with open(file, "rb") as opened:  # anew each time: a network file system looks for what is new then
            opened.seek(self.read.get(file, 0))
            lines: Iterator[bytes] = iter(opened)
            if not whole:
                lines = itertools.takewhile(lambda line: line.endswith(b"\n"), lines)
            return self._print(file, lines)

    def rest(self, file: Path) -> None:
        """Print what the file says and no other has said."""
        if file not in self.read:
            with open(file, "rb") as opened:
                lines = [line for line in opened if line.strip() and hash(_shown(line)) not in self.said]
            self._print(file, lines, " (what no log above has)")

    def _print(self, file: Path, lines: Iterable[bytes], note: str = "") -> bool:
        count = self.read.setdefault(file, 0)
        for line in lines:
            if file != self.last:
                print(*([""] if self.last else []), f"==> {file}{note} <==", sep="\n")
                self.last = file
            self.read[file] += len(line)
            shown = _shown(line)
            self.said.add(hash(shown))
            print(shown)
        sys.stdout.flush()
        return self.read[file] > count


def _shown(line: bytes) -> str:
    """A line that changes nothing of a terminal; of a bar that was drawn over and over, its last state."""
    text = line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
    return "".join(char if char.isprintable() or char == "\t" else "?" for char in text)
