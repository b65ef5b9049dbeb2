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
ENDED = re.compile(tpu_remote.ENDED.format(r"(\d+)").encode())


class Ended(NamedTuple):
    """How a command on the VM ended."""

    gcloud: int
    codes: Sequence[int]  # of the hosts that have said so, the earliest first
    followed: bool  # it was running there before
    cause: str  # the last that a program of ours said about its failure

    @property
    def code(self) -> int:
        """The first failure of a host: the others' follow from it."""
        return next(filter(None, self.codes), 0)


def shown(argv: Sequence[str], log: Path) -> Ended:
    """Run a command to its end; what it prints is shown and added to `log`. Ends it when interrupted."""
    codes: list[int] = []
    followed, cause = False, ""
    with open(log, "ab") as noted, start(argv, subprocess.PIPE) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                for file in (noted, sys.stdout.buffer):
                    file.write(line)
                    file.flush()
                codes += map(int, ENDED.findall(line))
                followed |= tpu_remote.FOLLOWED.encode() in line
                if match := re.search(rb"ERROR \d+: (.*)", line):
                    cause = match[1].decode(errors="replace")
        except BaseException:
            end(process)
            raise
    return Ended(process.returncode, codes, followed, cause)


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
