"""What this machine has: Slurm's programs, free ports, the processes of a cluster."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # an ordinary user's PATH lacks the daemons
MARK = "RELAY_CLUSTER"  # in every daemon's environment: with SLURM_CONF it tells whose daemon that is


def available() -> str | None:
    """Why no cluster can be had on this machine; None if one can."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    return f"no {', '.join(missing)}: python -m tests.cluster install (Debian, as root)" if missing else None


def free_ports(*names: str) -> dict[str, int]:
    """A free port for each name; below the ephemeral range, where an outgoing connection could take it."""
    ports: dict[str, int] = {}
    candidates = iter(random.sample(range(11000, 20000), 1000))
    while len(ports) < len(names):
        port = next(candidates)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports[names[len(ports)]] = port
    return ports


def processes(slurm_conf: str) -> list[int]:
    """Pids of the cluster's daemons, steps and jobs, but this one: its SLURM_CONF, and the mark or a job id.

    SLURM_CONF alone is in every program that a user starts to talk to the cluster. Command lines would not
    do: slurmdbd and slurmstepd name no file, a job's programs can be anything.
    """
    conf, own = f"SLURM_CONF={slurm_conf}".encode(), (f"{MARK}=".encode(), b"SLURM_JOB_ID=")
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            values = path.read_bytes().split(b"\0")
            if conf in values and any(value.startswith(own) for value in values):
                pids.append(int(path.parent.name))
    return [pid for pid in pids if pid != os.getpid()]
