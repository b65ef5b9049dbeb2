"""Ranks that find each other and agree. With one rank every verb is the identity and no group exists."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import env, files, log
from utils.device import describe, pick
from utils.errors import EnvironmentProblem
from utils.paths import RunDir
from utils.shared_config import DeviceName

# Longer than any step, validation pass or save; a rank that is stopped ends the others after it.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=5)


@contextlib.contextmanager
def session(device: DeviceName, run_dir: RunDir, workers: int = 0) -> Iterator[torch.device]:
    """Join this run's ranks (NCCL on CUDA, gloo on the CPU), start this rank's log, and yield its device.

    This rank's `workers` loader processes get cores of their own: on the CPU sharing costs several times as much.

    Raises: EnvironmentProblem when the ranks cannot find each other or the device is not there.
    """
    world = env.world()
    log.setup(world.rank, run_dir.rank_log(env.job_id(), env.restarts(), world.rank))
    chosen = pick(device, world.local_rank)
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)) // world.local_size)
    torch.set_num_threads(max(1, cores - workers))
    log.info(f"rank {world.rank} of {world.size} on {socket.gethostname()}: {describe(chosen)}")
    if world.size == 1:
        yield chosen
        return
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=_store(world, run_dir),
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    yield chosen
    dist.barrier()
    dist.destroy_process_group()  # not after an error: peers that hang would make it hang too


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def agree(value: str) -> str:
    """Rank 0's `value` on every rank."""
    holder = [value]
    if size() > 1:
        dist.broadcast_object_list(holder, src=0)
    return holder[0]


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with gradients averaged over ranks; itself when there is one rank.

    Buffers are not broadcast each step: what training reads of them (MoCo's queue) is the same on every rank
    already, and BatchNorm's running averages, which it never reads, are taken from rank 0 when it matters.
    """
    if size() == 1:
        return model
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def mean(values: torch.Tensor) -> torch.Tensor:
    """Elementwise mean over ranks."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= size()
    return values


def broadcast(values: torch.Tensor) -> torch.Tensor:
    """Rank 0's values on every rank, in place."""
    if size() > 1:
        dist.broadcast(values, src=0)
    return values


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(n_r, ...) of every rank -> (sum n_r, ...) in rank order, on every rank."""
    if size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(size())]
    dist.all_gather(counts, count)
    longest = int(max(counts))
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, counts, strict=True)])


def _store(world: env.World, run_dir: RunDir) -> dist.Store:
    """The key-value store of this run.

    torchrun brings its own. Under Slurm rank 0 lets the system choose a free port and writes address,
    port and a secret to a file that only this job step reads: no two jobs can meet on one port.
    """
    if world.launcher == "torchrun":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # the agent's own store already listens there
        listens = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return dist.PrefixStore("relay", dist.TCPStore(host, port, world.size, listens, RENDEZVOUS_TIMEOUT))
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
