"""Errors a user can act on, and the exit code each one ends a program with."""

from __future__ import annotations

import errno
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


class DivergedError(RelayError):
    """The loss is not finite any more."""

    exit_code = 4


class EnvironmentProblem(RelayError):
    """The machine, not the user: disk, port, scheduler, half-set rank variables."""

    exit_code = 75


def exit_code(error: BaseException) -> int:
    """The exit code `error` ends a program with; 1 for anything unexpected."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return EnvironmentProblem.exit_code
    return error.exit_code if isinstance(error, RelayError) else 1


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
    except Exception as error:
        if not isinstance(error, RelayError):
            traceback.print_exc()
        print(f"ERROR {exit_code(error)}: {message(error)}", file=sys.stderr, flush=True)
        sys.exit(exit_code(error))
