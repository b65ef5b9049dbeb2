"""Signals that ask a run to end: noted here, acted on at the end of a step, never inside a handler."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

# Slurm ahead of the time limit (which one is the job's choice), and preemption, scancel or a terminal's kill.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_received: list[str] = []


def requested() -> str | None:
    """The name of the first signal that has asked this process to end."""
    return _received[0] if _received else None


def told() -> str:
    """By what this run was asked to end, in words."""
    return requested() or "a signal to another rank"


def _note(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def note(numbers: Sequence[signal.Signals] = SIGNALS) -> None:
    """Note the signals from now on."""
    for number in numbers:
        signal.signal(number, _note)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Note the signals instead of dying of them; afterwards they do what they did before.

    In another thread than the main one who started it has called `note`.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is threading.main_thread():
        note()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
        _received.clear()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Deliver the signals only afterwards: to a process that is started here, once it lets them through."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore() -> None:
    """For helper processes: the signal goes to all processes of a job, and their parent decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
