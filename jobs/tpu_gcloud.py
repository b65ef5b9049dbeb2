"""gcloud called: what its answers mean, and what is asked again while the network is down."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

from jobs.tpu_shown import say
from utils.errors import EnvironmentProblem

POLL = 30.0  # seconds between two attempts at the same
PATIENCE = 30  # minutes; a VM is not given up because this machine is cut off for less
LONGEST = 3600  # seconds one gcloud command may take; creating a large slice is slow
LOGIN = r"auth login|auth tokens|UNAUTHENTICATED|Reauthentication"
# Without a network gcloud also says that its tokens cannot be refreshed, and to log in.
NETWORK = r"HTTPSConnectionPool|ConnectionError|Connection aborted|TransportError|[Tt]imed out|UNAVAILABLE|DEADLINE_EXC"


class Missing(EnvironmentProblem):
    """gcloud knows nothing of that name."""


class Exists(EnvironmentProblem):
    """What was to be made is there already."""


class Unreachable(EnvironmentProblem):
    """Google does not answer."""


def call(argv: list[str]) -> str:
    """The output of a gcloud command. Raises: Missing, Exists, Unreachable, EnvironmentProblem, in its words."""
    what = " ".join(argv[3:6])
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=LONGEST,
            start_new_session=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise EnvironmentProblem("gcloud: no such program; install the Google Cloud CLI, then `gcloud init`") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"gcloud {what}: no answer in {LONGEST} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if "NOT_FOUND" in said:
            raise Missing(said)
        if "ALREADY_EXISTS" in said:
            raise Exists(f"gcloud {what}: {said}; the same command uses it")
        if re.search(NETWORK, said):
            raise Unreachable(f"gcloud {what}: cannot reach Google: {said}")
        if re.search(LOGIN, said):
            raise EnvironmentProblem(f"gcloud is not logged in: run `gcloud auth login`, then the same again ({said})")
        raise EnvironmentProblem(f"gcloud {what}: {said}")
    return done.stdout.strip()


T = TypeVar("T")


def patiently(ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again while it fails. Raises: EnvironmentProblem when it does for PATIENCE minutes."""
    end, told = time.monotonic() + PATIENCE * 60, False
    while True:
        try:
            return ask()
        except EnvironmentProblem as error:
            if time.monotonic() > end:
                raise
            if not told:
                say(f"{error}; trying again for {PATIENCE} minutes")
                told = True
        time.sleep(POLL)
