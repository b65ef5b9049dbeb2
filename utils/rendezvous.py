"""How the ranks of a run find each other."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
from pathlib import Path

import torch.distributed as dist

from utils import env, files
from utils.errors import EnvironmentProblem
from utils.paths import RunDir

TOKEN = "RELAY_TOKEN"
RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=5)


def store(world: env.World, run_dir: RunDir) -> dist.Store:
    """The key-value store of this run.

    torchrun brings its own; the first rank to come claims it with a secret of the run directory. Under Slurm
    rank 0 lets the system choose a free port and writes address, port and a secret to a file that only this job
    step reads. So no two runs meet on one port.

    Raises: EnvironmentProblem.
    """
    if world.launcher == "torchrun":
        return _torchrun_store(world, run_dir)
    file = run_dir.rendezvous(env.job_id(), env.step_id(), env.restarts())
    if world.rank == 0:
        host, token = _own_address(), secrets.token_hex(16)
        store = dist.TCPStore(host, 0, world.size, True, RENDEZVOUS_TIMEOUT, wait_for_workers=False)
        store.set("token", token)
        files.write_json(file, {"host": host, "port": store.port, "token": token})
        return store
    meeting = _wait_for(file)
    store = dist.TCPStore(meeting["host"], meeting["port"], world.size, False, RENDEZVOUS_TIMEOUT)
    if store.get("token").decode() != meeting["token"]:
        raise EnvironmentProblem(f"{meeting['host']}:{meeting['port']} belongs to another run; see {file}")
    return store


def _torchrun_store(world: env.World, run_dir: RunDir) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # the agent's own store already listens there
    listens = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        found = dist.TCPStore(host, port, world.size, listens, RENDEZVOUS_TIMEOUT, wait_for_workers=False)
    except dist.DistNetworkError as error:
        raise EnvironmentProblem(f"{host}:{port}: {str(error).splitlines()[0]}") from None
    file = run_dir.logs / ".token"
    owner = found.compare_set("relay/owner", "", _secret(file)).decode()
    if owner != _secret(file):
        raise EnvironmentProblem(f"{host}:{port} belongs to another run; see {file}")
    return dist.PrefixStore("relay", found)


def _secret(file: Path) -> str:
    """What is in `file`; the first process to ask writes it. Hosts of a TPU slice share none, see `xla.variables`."""
    if token := os.environ.get(TOKEN):
        return token
    files.write_new(file, secrets.token_hex(16))
    return file.read_text()


def _wait_for(file: Path) -> dict:
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(file.read_text())
        time.sleep(0.1)
    raise EnvironmentProblem(f"rank 0 did not write {file} in {RENDEZVOUS_TIMEOUT}; is it on a shared file system?")


def _own_address() -> str:
    """An address of this node that the others reach.

    `MASTER_ADDR` if the site sets it, else the address Slurm launches from when it is one of ours (names
    need not resolve on a cluster), else this host's own.
    """
    candidates = [os.environ.get("MASTER_ADDR"), os.environ.get("SLURM_LAUNCH_NODE_IPADDR"), socket.getfqdn()]
    for candidate in filter(None, candidates):
        with contextlib.suppress(OSError):
            address = socket.gethostbyname(candidate)
            with socket.socket() as probe:
                probe.bind((address, 0))
            return address
    raise EnvironmentProblem(f"no address of this node can be bound ({candidates}); set MASTER_ADDR in slurm/site.sh")
