"""One process for each XLA device of this machine, each a rank: what torchrun is for GPUs.

    python -m utils.xla_run -m ssl_train.train device=xla --run-dir ... --dataset-root ...

On a slice of several hosts the same command on each of them. The ranks get torchrun's variables; the first that fails
ends all, and its exit code is that of the whole. Signals that ask for the end are passed on to every rank. Of a
launcher that is killed the ranks die too: else they would keep the chips.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType

from utils import device, loader_processes, stop
from utils.errors import InputError, cli

KILLED = 137  # of a rank that left no exit code
ASKS = signal.SIGUSR1  # a rank to end; TERM ends it at once, which is how the pool ends those that wait for a lost one

LAUNCHER = "RELAY_XLA_LAUNCHER"  # its process id, for its ranks
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def die_with_launcher() -> None:
    """Have the kernel kill this process when its launcher ends, however that does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it has ended before
        os._exit(KILLED)


if __name__ == "__mp_main__":  # a rank; torch_xla runs its program in another thread, which may not do this
    die_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal, to all: the launcher of the ranks passes it on
    stop.note((ASKS,))


def rank(ordinal: int, module: str, words: Sequence[str], port: int, failed: str) -> None:
    """`python -m module words` as one rank, in a process of its own. Its exit code, if not 0, is left in `failed`."""
    os.environ |= device.xla_rank(port)
    sys.argv = [module, *words]
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    loader_processes.end()
    if code:
        (Path(failed) / str(ordinal)).write_text(str(code if isinstance(code, int) else 1))
        os._exit(1)  # the pool notices, and ends the others, which would wait for this one


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["-m"] or len(words) < 2:
        raise InputError(f"python -m utils.xla_run -m MODULE [WORDS...], not {' '.join(words) or 'without words'}")
    for number in (signal.SIGINT, *stop.SIGNALS):
        signal.signal(number, _pass_on)
    os.environ[LAUNCHER] = str(os.getpid())
    with tempfile.TemporaryDirectory() as failed:
        try:
            device.launch_xla(rank, (words[1], words[2:], _free_port(), failed))
        except BrokenProcessPool:
            first = sorted(Path(failed).iterdir(), key=lambda file: file.stat().st_mtime_ns)[:1]
            sys.exit(int(first[0].read_text()) if first else KILLED)


def _pass_on(number: int, _: FrameType | None) -> None:
    ranks = [process.pid for process in multiprocessing.active_children() if process.pid]
    for pid in ranks:
        os.kill(pid, ASKS)
    if not ranks:
        sys.exit(128 + number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    cli(main)
