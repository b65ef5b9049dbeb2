"""Errors a user can act on, and the exit code each one ends a program with."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

LONGEST = 300  # characters of a one-line cause


class RelayError(Exception):
    """Base of the errors that end a program with one line instead of a traceback."""

    exit_code = 1


class InputError(RelayError, ValueError):
    """Bad input: configuration, data, arguments, a parent stage that is not done."""

    exit_code = 2


class CheckpointError(RelayError):
    """There are checkpoints, and none of them can be used."""

    exit_code = 3


class DivergedError(RelayError):
    """The loss is not finite any more."""

    exit_code = 4


class CheckFailed(RelayError):
    """A number is not what the command line asks of it."""

    exit_code = 5


class EnvironmentProblem(RelayError):
    """The machine, not the user: disk, port, scheduler, half-set rank variables."""

    exit_code = 75


class Stopped(RelayError):
    """Not an error: a signal asked this run to end, and it did, with its work saved; the same again goes on."""

    exit_code = 0


def exit_code(error: BaseException) -> int:
    """The exit code `error` ends a program with; 1 for anything unexpected."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return EnvironmentProblem.exit_code
    return error.exit_code if isinstance(error, RelayError) else 1


def error_like(code: int, text: str) -> RelayError:
    """The error of ours that ends a program with `code`, made again on another rank."""
    return next((kind for kind in RelayError.__subclasses__() if kind.exit_code == code), RelayError)(text)


# What torch says when something outside this process failed, and what it means.
OUTSIDE = (
    (
        r"DataLoader worker \(pid\S* (\d+)\) is killed by signal: (\w+)",
        "loader process {0} was killed ({1}), perhaps for memory; ask for more, or set fewer workers",
    ),
    (
        r"DataLoader worker \(pid\S* ([\d, ]+)\) exited unexpectedly",
        "loader process {0} ended, perhaps killed for memory; ask for more, or set fewer workers",
    ),
    (
        r"gloo|NCCL|Connection closed by peer|Connection reset by peer|pair closure|Broken pipe|Timed out waiting",
        "lost another rank, which ended or did not answer in time; its own log may say why",
    ),
)


def explained(error: RuntimeError) -> EnvironmentProblem | None:
    """What torch's error for a process that was lost means; None for another error."""
    if not str(error).startswith("Caught "):  # a loader worker's own error
        said = f"{error}\n{error.__cause__}"  # the loader's does not say how its process ended, its cause may
        for pattern, meaning in OUTSIDE:
            if match := re.search(pattern, said):
                return EnvironmentProblem(f"{meaning.format(*match.groups())} ({str(error).strip().splitlines()[0]})")
    return None


def message(error: BaseException) -> str:
    """The text of `error`; of one that a loader worker passed on, without the traceback around it."""
    text = str(error)
    if text.startswith("Caught "):
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return text


def one_line(error: BaseException) -> str:
    """`error` as the single line, of bounded length, that state files and `--status` show."""
    text = " ".join(message(error).split()) or type(error).__name__
    text = text if isinstance(error, RelayError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def cli(main: Callable[[], Any]) -> None:
    """Run a program's `main`; end the process with the documented exit code.

    An error of ours prints one `ERROR <code>: <cause>` line, anything else its traceback as well.
    """
    try:
        main()
    except Stopped as stopped:
        print(stopped, flush=True)
    except Exception as error:
        if not isinstance(error, RelayError):
            traceback.print_exc()
        print(f"ERROR {exit_code(error)}: {message(error)}", file=sys.stderr, flush=True)
        sys.exit(exit_code(error))
