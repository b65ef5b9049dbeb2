"""PyTorch/XLA behind `utils/device.py` and `utils/dist.py`: no other module imports torch_xla.

A step is traced and compiled once; then the host only hands out batches. So nothing here asks the device for a value
within a step, and every shape is the same in each.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from utils import rendezvous
from utils.env import World
from utils.errors import EnvironmentProblem

# Else the numbers 0 and 1 are part of a graph: a learning rate that is 0 at first would be another one.
os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
try:
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as metrics
    import torch_xla.distributed.parallel_loader as parallel_loader
    import torch_xla.runtime as xr
except ImportError as error:
    raise EnvironmentProblem(f"device=xla: {error}; make install-tpu puts it into .venv-tpu") from None

PORT = 29417  # where the ranks of several machines meet
AHEAD = 2  # batches that are on the device before they are asked for


def pick(world: World) -> torch.device:
    """The XLA device of this process. Raises: EnvironmentProblem unless every device of this machine has one."""
    device = torch_xla.device()
    alone = "start one process a device: python -m utils.xla_run -m MODULE ..."
    if world.size == 1 and xr.global_runtime_device_count() > 1:
        raise EnvironmentProblem(f"device=xla: one process and {xr.global_runtime_device_count()} devices; {alone}")
    if world.size > 1 and xr.device_type() == "TPU" and xr.world_size() != world.size:
        raise EnvironmentProblem(f"device=xla: {world.size} processes and {xr.world_size()} in XLA's eyes; {alone}")
    return device


def launch(rank: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """`rank(ordinal, *arguments)` in a new process for each device of this machine, in a thread of it."""
    torch_xla.launch(rank, args=arguments)


def variables(port: int) -> dict[str, str]:
    """torchrun's, for a process that `launch` has started; ranks of one machine meet at its `port`.

    Raises: EnvironmentProblem where a process has several devices.
    """
    if xr.addressable_device_count() > 1:
        raise EnvironmentProblem("device=xla: two devices a chip, as TPU v2 and v3 have, are not supported; take v4 on")
    size, local_size = xr.world_size(), xr.local_process_count()
    place: dict[str, Any] = {"RANK": xr.global_ordinal(), "WORLD_SIZE": size}
    place |= {"LOCAL_RANK": xr.local_ordinal(), "LOCAL_WORLD_SIZE": local_size}
    if size == local_size:
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    else:  # only one run at a time has the chips of a slice, so no other is taken for it
        place |= {"MASTER_ADDR": xr.get_master_ip(), "MASTER_PORT": PORT, rendezvous.TOKEN: "slice"}
    return {name: str(value) for name, value in place.items()}


def kind() -> str:
    """What computes, such as `XLA TPU v4`; the CPU's own name for itself is `cpu`."""
    kind = xm.xla_device_kind()
    return f"XLA {kind.upper() if kind == 'cpu' else kind}"


def computes_in_bf16() -> bool:
    """Every TPU does; XLA on a CPU emulates it."""
    return xr.device_type() == "TPU"


def seed(number: int) -> None:
    """The device's own generator; torch.manual_seed does not reach it."""
    torch_xla.manual_seed(number)


def step(optimizer: torch.optim.Optimizer) -> None:
    """Average the gradients over ranks, step, and hand what was traced to the device; nothing is waited for."""
    if _has_collectives():
        xm.optimizer_step(optimizer)
    else:
        _average_on_host(optimizer)
        optimizer.step()
    sync()


def sync() -> None:
    """Hand what was traced to the device."""
    torch_xla.sync()


def gather(rows: torch.Tensor) -> torch.Tensor:
    """(n, ...) of every rank -> (n * ranks, ...) in rank order, without gradients."""
    if _has_collectives():
        return xm.all_gather(rows, pin_layout=False)
    own = rows.detach().cpu()
    gathered = own.new_empty((dist.get_world_size() * len(own), *own.shape[1:]))
    dist.all_gather_into_tensor(gathered, own)
    return gathered.to(rows.device)


def _has_collectives() -> bool:
    """XLA's CPU devices know nothing of each other: their processes exchange on the host, by gloo."""
    return xr.world_size() > 1


def _average_on_host(optimizer: torch.optim.Optimizer) -> None:
    if not dist.is_initialized():
        return
    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    flat = torch.cat([each.grad.flatten() for each in parameters]).cpu()
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).to(parameters[0].device).split([each.numel() for each in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def compiles() -> int:
    """How many graphs this process has compiled."""
    counted = metrics.metric_data("CompileTime")
    return counted[0] if counted else 0


class Batches:
    """The batches of `source` on the device, put there by a thread while the device computes the ones before.

    torch_xla's loader ends without a word when `source` raises, and makes lists of named tuples: here its error is
    raised, and a batch keeps its type.
    """

    def __init__(self, source: Iterator[Any], device: torch.device) -> None:
        self._source, self._structures = source, deque[pytree.TreeSpec]()
        self._error: BaseException | None = None
        sizes = {"loader_prefetch_size": AHEAD, "device_prefetch_size": AHEAD}
        self._parallel = parallel_loader.ParallelLoader(self._flat(), [device], **sizes)
        self._batches = self._parallel.per_device_loader(device)

    def _flat(self) -> Iterable[Sequence[torch.Tensor]]:
        try:
            for batch in self._source:
                leaves, structure = pytree.tree_flatten(batch)
                self._structures.append(structure)
                yield leaves
        except BaseException as error:  # in a thread, from where it would be lost
            self._error = error

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        try:
            leaves = next(self._batches)
        except StopIteration:
            if self._error:
                raise self._error from None
            raise
        return pytree.tree_unflatten(leaves, self._structures.popleft())

    def close(self) -> None:
        self._parallel.close()
