"""Ranks that find each other and agree. With one rank every verb is the identity and no group exists."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import device as devices
from utils import env, log, mirror, paths, rendezvous, run_lock, stop, timeline
from utils.device import on_host
from utils.errors import Stopped, error_like, exit_code, explained, one_line
from utils.paths import RunDir
from utils.shared_config import DeviceName

_patience = 0.0
_host_group: dist.ProcessGroup | None = None  # for what ranks tell each other past their devices


@contextlib.contextmanager
def session(
    device: DeviceName, run_dir: RunDir, *, timeout: float, workers: int = 0, deterministic: bool = False
) -> Iterator[torch.device]:
    """Join this run's ranks (NCCL on CUDA, gloo on CPU and XLA), start this rank's log, and yield its device.

    No other run writes to `run_dir` meanwhile, and signals that ask for the end are noted (`utils.stop`).
    This rank's `workers` loader processes get cores of their own: on the CPU sharing costs several times as much.
    `timeout`, in seconds, is longer than any step, validation pass or local save; a rank that hangs ends the others.

    Raises: EnvironmentProblem when the ranks cannot find each other, lose one, or the device is not there;
    InputError when the directory is another run's.
    """
    global _patience, _host_group
    timeline.done("start-up", "imports")
    world, _patience = env.world(), timeout
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening())
        paths.make_private(run_dir.path)
        if world.rank == 0:
            stack.enter_context(run_lock.owned(run_dir))
        stack.enter_context(mirror.kept(run_dir, world.rank))
        log.setup(world.rank, run_dir.rank_log(env.job_id(), env.restarts(), world.rank))
        if deterministic:
            devices.make_deterministic()
        chosen = devices.pick(device, world)
        cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)) // world.local_size)
        torch.set_num_threads(max(1, cores - workers))
        log.info(f"rank {world.rank} of {world.size} on {os.uname().nodename}: {devices.describe(chosen)}")
        stack.enter_context(timeline.kept(run_dir, world, devices.describe(chosen)))
        if world.size > 1:
            dist.init_process_group(
                devices.BACKENDS.get(chosen.type, "gloo"),
                store=rendezvous.store(world, run_dir),
                rank=world.rank,
                world_size=world.size,
                timeout=datetime.timedelta(seconds=timeout),
                device_id=chosen if chosen.type == "cuda" else None,
            )
            _host_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        timeline.done("start-up", "session")
        try:
            yield chosen
        except Stopped:
            _leave()
            raise
        except RuntimeError as error:
            if problem := explained(error):
                raise problem from error
            raise
        _leave()


def _leave() -> None:
    """Only where all ranks do: after an error peers that hang would make this one hang too."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def patience() -> float:
    """Seconds to wait for another process before it counts as lost; 0 outside a session: for ever."""
    return _patience


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def agree(value: str) -> str:
    """Rank 0's `value` on every rank."""
    if size() == 1:
        return value
    # as bytes: torch's own way to send objects unpickles what it gets
    text = torch.tensor(list(value.encode()), dtype=torch.uint8)
    length = torch.tensor(len(text))
    dist.broadcast(length, src=0, group=_host_group)
    text = text if rank() == 0 else text.new_zeros(int(length))
    dist.broadcast(text, src=0, group=_host_group)
    return bytes(text.tolist()).decode()


def from_rank_0(decide: Callable[[], str]) -> str:
    """What `decide` returns on rank 0, on every rank. What it raises there, every rank raises."""
    answer, own = "", None
    if rank() == 0:
        try:
            answer = f"0 {decide()}"
        except Exception as error:  # the others wait for an answer
            own = error
            answer = f"{exit_code(error)} {one_line(error)}"
    code, _, text = agree(answer).partition(" ")
    if code != "0":
        raise own or error_like(int(code), text)  # rank 0's with its traceback
    return text


STOP = 2  # the wish to end


class Wishes:
    """What any rank wants of all, agreed on without waiting for a device.

    Each rank passes its wish, 0 or more, once a step and gets the greatest of all ranks' wishes of the step
    before: the answer travels while the step is computed.
    """

    def __init__(self) -> None:
        self.wish, self.answer = torch.zeros((), dtype=torch.long), None

    def exchange(self, wish: int) -> int:
        if size() == 1:
            return wish
        agreed = 0
        if self.answer:
            self.answer.wait()
            agreed = int(self.wish)
        self.wish = torch.tensor(wish)
        self.answer = dist.all_reduce(self.wish, dist.ReduceOp.MAX, group=_host_group, async_op=True)
        return agreed


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with gradients averaged over ranks; itself when there is one rank, and on XLA, see `device.step`.

    Buffers are not broadcast each step: what training reads of them (MoCo's queue) is the same on every rank
    already, and BatchNorm's running averages, which it never reads, are taken from rank 0 when it matters.
    """
    if size() == 1 or device.type == "xla":
        return model
    # Gradients are summed in other groups after a process's first step, a resumed one's too, unless DDP has to look
    # for unused ones; sums of more than two ranks' feel that in the last digits. It warns that there are none.
    exact = size() > 2 and (device.type == "cpu" or torch.are_deterministic_algorithms_enabled())
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=exact)


def mean(values: torch.Tensor) -> torch.Tensor:
    """Elementwise mean over ranks; of what compiles it is on the CPU, see `device.on_host`."""
    values = on_host(values)
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values, group=_host_group if values.device.type == "cpu" else None)
        values /= size()
    return values


def broadcast(values: torch.Tensor) -> torch.Tensor:
    """Rank 0's values on every rank, in place."""
    if size() > 1:
        dist.broadcast(shared := on_host(values), 0, _host_group if shared.device.type == "cpu" else None)
        values.copy_(shared)
    return values


def gather(rows: torch.Tensor) -> torch.Tensor:
    """(n, ...) of every rank, n the same on all -> (n * ranks, ...) in rank order; one collective, not waited for."""
    return rows if size() == 1 else devices.gather(rows, _host_group if rows.device.type == "cpu" else None)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(n_r, ...) of every rank -> (sum n_r, ...) in rank order, on every rank."""
    counts = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros((max(counts) - len(rows), *rows.shape[1:]))])
    parts = gather(padded).view(size(), *padded.shape)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
