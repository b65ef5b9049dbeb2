"""The processes of a loader: what each does first, how long they are waited for, how they end."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import torch

from utils import log, stop
from utils.errors import EnvironmentProblem

SILENT = "a loader process gave nothing for {:.0f} s: it hangs, or the disk does; the rest of this log says more"


def prepare(_: int) -> None:
    """What each does first: it computes on one thread, and leaves to its parent what a signal means."""
    torch.set_num_threads(1)
    stop.ignore()


@contextlib.contextmanager
def answer_within(seconds: float) -> Iterator[None]:
    """An alarm, since a DataLoader's own timeout does not see a worker that hangs while it hands over a tensor."""
    if not seconds:
        yield
        return

    def silent(*_: object) -> None:
        raise EnvironmentProblem(SILENT.format(seconds))

    if threading.current_thread() is not threading.main_thread():  # a rank of utils/xla_run.py: no signal reaches it
        alarm = threading.Timer(seconds, _give_up, (seconds,))
        alarm.start()
        try:
            yield
        finally:
            alarm.cancel()
        return
    before = signal.signal(signal.SIGALRM, silent)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except EnvironmentProblem:
        end()  # torch waits for its thread that talks to them
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _give_up(seconds: float) -> None:
    log.warning(SILENT.format(seconds))
    end()
    os._exit(EnvironmentProblem.exit_code)


@atexit.register  # later than multiprocessing's own, which it therefore precedes
def end() -> None:
    """They ignore the TERM by which multiprocessing would end them with this program, and wait for it for ever."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take it for a crash
    for worker in multiprocessing.active_children():
        worker.kill()
