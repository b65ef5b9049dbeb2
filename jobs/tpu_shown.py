"""A command on a TPU VM: shown and noted while it runs, and out of reach of a terminal's Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs import tpu_remote
from utils import stop

SIGNALS = (signal.SIGINT, signal.SIGHUP, *stop.SIGNALS)
ENDED = re.compile(tpu_remote.ENDED.format(r"(\d+)"))
REFUSED = re.compile(tpu_remote.REFUSED.format("(.*)"))
CAUSE = re.compile(r"ERROR \d+: (.*)")


class Ended(NamedTuple):
    """How a command on the VM ended."""

    gcloud: int
    codes: Sequence[int]  # of the hosts that have said so, the earliest first
    started: bool  # it has begun there
    followed: bool  # it was running there before
    refused: str  # the other command that runs there
    cause: str  # the last that a program of ours said about its failure

    @property
    def code(self) -> int:
        """The first failure of a host: the others' follow from it."""
        return next(filter(None, self.codes), 0)


def shown(argv: Sequence[str], log: Path) -> Ended:
    """Run a command to its end; what it prints is added to `log` and shown. Ends it when interrupted."""
    codes: list[int] = []
    started, followed, refused, cause = False, False, "", ""
    with open(log, "ab") as noted, start(argv, subprocess.PIPE) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                noted.write(line)
                noted.flush()
                with terminal():
                    if sys.stdout:
                        sys.stdout.buffer.write(line)
                        sys.stdout.buffer.flush()
                text = line.decode(errors="replace")
                codes += map(int, ENDED.findall(text))
                started |= tpu_remote.STARTED in text
                followed |= tpu_remote.FOLLOWED in text
                refused = next(iter(REFUSED.findall(text)), refused)
                cause = next(iter(CAUSE.findall(text)), cause)
        except BaseException:
            end(process)
            raise
    return Ended(process.returncode, codes, started, followed, refused, cause)


def say(text: str) -> None:
    """Print a line. Whatever this program has in hand goes on without a terminal."""
    with terminal():
        print(text, flush=True)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Write to the terminal; where it is gone, nowhere from then on."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def start(argv: Sequence[str], output: int | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End gcloud and the ssh it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


@contextlib.contextmanager
def handling(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` for the signals that ask for an end; one that is ignored, as under nohup, stays so."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, lambda *_: handler())
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
