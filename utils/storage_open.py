"""File systems of fsspec, opened by each process for itself; what is tried again; what their errors mean to a user.

No text of a server or of a library stands in an error: it could hold a token or a signed URL.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from utils import storage_google as google
from utils.errors import EnvironmentProblem, InputError, RelayError

TRIES, FIRST_WAIT = 4, 0.5  # of what gcsfs does not try again by itself; seconds, doubled each time

# By process too: gcsfs refuses to work in a fork, and what a fork inherits must stay referenced there, since closing
# its connections takes them out of the epoll that it still shares with the parent.
_opened: dict[tuple[int, str], Any] = {}


class Cut(Exception):
    """A body that is not what was asked for."""


def scheme(url: str) -> str:
    return url.partition("://")[0]


def file_system(url: str) -> Any:
    """The file system of a URL in this process. Raises: EnvironmentProblem if its package is not installed."""
    key = os.getpid(), scheme(url)
    if key not in _opened:
        _opened[key] = google.opened() if key[1] in google.SCHEMES else _other(key[1])
    return _opened[key]


def _other(name: str) -> Any:
    try:
        import fsspec  # type: ignore[import-untyped]

        return fsspec.filesystem(name, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise EnvironmentProblem(f"{name}:// cannot be used here ({error}); pip install what it needs") from None
    except ValueError:
        raise InputError(f"{name}://: no such kind of storage; use gs://, or a path") from None


T = TypeVar("T")


def call(url: str, do: Callable[[Any, str], T]) -> T:
    """What `do` returns for the file system of a URL and the path in it, tried again when that can help.

    Raises: FileExistsError; InputError, nothing is there; EnvironmentProblem, the storage does not do its part.
    """
    for number in range(TRIES):
        if number:
            wait(number)
        try:
            system = file_system(url)
            return do(system, system._strip_protocol(url))
        except Exception as error:
            if number + 1 < TRIES and passes(error):
                continue
            if (problem := explained(url, error)) is None:
                raise
            raise problem from None
    raise AssertionError("unreachable")


def wait(number: int) -> None:
    """Before try `number`, from 1: longer each time, and not as long as others that failed at the same time."""
    time.sleep(FIRST_WAIT * 2 ** (number - 1) * (0.5 + random.random()))


def passes(error: BaseException) -> bool:
    """Whether the same again may help, and gcsfs has not done that: it repeats 408, 429, 5xx and lost connections
    for half a minute, but neither a request that takes too long nor one for a token.
    """
    if isinstance(error, (Cut, ConnectionError, TimeoutError, asyncio.TimeoutError)):
        return not _is_of_aiohttp(error)
    return type(error).__name__ == "TransportError" and type(error).__module__ == "google.auth.exceptions"


def _is_of_aiohttp(error: BaseException) -> bool:
    return any(kind.__module__.startswith("aiohttp.") for kind in type(error).__mro__)


def explained(url: str, error: BaseException) -> RelayError | FileExistsError | None:
    """The error of ours that `error` is; None for one that is none of the storage's."""
    if isinstance(error, (RelayError, FileExistsError)):
        return error
    if isinstance(error, FileNotFoundError):
        return InputError(f"{url}: not found; check the bucket and the name")
    if isinstance(error, Cut):
        return EnvironmentProblem(f"{url}: {error}, also after {TRIES} tries; try again later")
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return EnvironmentProblem(
            f"{url}: the storage does not answer in time, also after several tries; check the network"
        )
    return google.explained(url, error) if scheme(url) in google.SCHEMES else None
