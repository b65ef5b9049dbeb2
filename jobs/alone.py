"""One launcher of a chain at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from jobs.stages import Chain
from utils import files, paths
from utils.errors import InputError

PATIENCE = 120  # seconds; putting a chain into Slurm's queue takes a few, with a slurmctld that is down a minute


@contextlib.contextmanager
def alone(chain: Chain, cluster: str) -> Iterator[None]:
    """Hold the chain's lock; wait for another launcher that only queues jobs. Raises: InputError.

    The lock does not reach other login nodes: what they have queued is found by its tags.
    """
    paths.make_private(chain.dir.path)
    file, end, told = chain.dir.lock, time.monotonic() + PATIENCE, False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(files.lock(file, blocking=False))
                break
            except BlockingIOError:
                holder = file.read_text().strip()
                text = f"another launcher is at work on {chain.name}: {holder or file}"
                if {cluster, holder.rpartition(" ")[2]} != {"slurm"} or time.monotonic() > end:
                    raise InputError(text) from None
                if not told:
                    print(f"{text}; waiting", flush=True)
                    told = True
                time.sleep(0.1)
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}, cluster {cluster}\n")
        yield
