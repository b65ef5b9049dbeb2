"""CPU, CUDA, XLA and, untested, torch-tpu behind a handful of verbs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from utils.env import World
from utils.errors import EnvironmentProblem
from utils.shared_config import COMPILING, DeviceName, Precision

Module = TypeVar("Module", bound=nn.Module)
T = TypeVar("T")


BACKENDS = {"cuda": "nccl", "tpu": "tpu_dist"}  # how devices' ranks talk; all others' meet on the host


def pick(name: DeviceName, world: World) -> torch.device:
    """The device of this rank: `auto` is CUDA when there is any. Raises: EnvironmentProblem, never a fallback."""
    local_rank = world.local_rank
    if name == "xla":
        return _xla().pick(world)
    if name == "tpu":
        return _torch_tpu(local_rank)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # srun --gpus-per-task shows each rank just its own GPU, as number 0.
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise EnvironmentProblem(f"device={name}: local rank {local_rank} has no GPU ({count} visible)")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _xla() -> ModuleType:
    from utils import xla  # and with it torch_xla, which has an environment of its own

    return xla


def _torch_tpu(local_rank: int) -> torch.device:
    """A chip by torch-tpu, which torch loads by itself where it is installed. Untested: it has no emulation."""
    device = torch.device("tpu", local_rank)
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentProblem(f"device=tpu: {reason}; on a TPU VM, pip install -e .[torch-tpu]") from None
    return device


def place(model: Module, device: torch.device) -> Module:
    """`model` on `device`, the weights of convolutions in channels_last: the faster format for float32 and bf16.

    What compiles lays out its memory itself.
    """
    if device.type in COMPILING:
        return model.to(device)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def make_deterministic() -> None:
    """Have CUDA compute the same bits each time, slower; the CPU does anyway. Before anything is computed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # that all-reduce adds in no fixed order
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bf16"]:
    """`auto` is bf16 where the hardware computes in it, else float32: emulated bf16 is slower than float32."""
    if precision != "auto":
        return precision
    if device.type == "xla":
        native = _xla().computes_in_bf16()
    elif device.type == "tpu":
        native = True
    elif device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )  # fmt: skip
    return "bf16" if native else "float32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """bf16 autocast when `precision` says so; weights, optimizer and losses stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def seed(number: int, device: torch.device) -> None:
    """Seed all generators that a step on `device` draws from."""
    torch.manual_seed(number)
    if device.type == "xla":
        _xla().seed(number)


def step(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Step with the gradients averaged over ranks: here on XLA, elsewhere they are by now."""
    if device.type == "xla":
        _xla().step(optimizer)
    else:
        optimizer.step()


def gather(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """See `dist.gather`; there are several ranks, of `group`."""
    if rows.device.type == "xla":
        return _xla().gather(rows)
    gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group)
    return gathered


@contextlib.contextmanager
def fed(batches: Iterator[T], device: torch.device) -> Iterator[Iterator[T]]:
    """`batches`, which the program copies to its device; for XLA a thread does, ahead of time."""
    if device.type != "xla":
        yield batches
        return
    with contextlib.closing(_xla().Batches(batches, device)) as ahead:
        yield ahead


def launch_xla(rank: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """`rank(ordinal, *arguments)` in a new process for each XLA device of this machine."""
    _xla().launch(rank, arguments)


def xla_rank(port: int) -> dict[str, str]:
    """This process's place among those that `launch_xla` has started, as torchrun's variables."""
    return _xla().variables(port)


def compiles() -> int:
    """How many graphs XLA has compiled in this process."""
    return _xla().compiles()


def on_host(values: Any) -> Any:
    """`values`, nested, with tensors of what compiles copied to the CPU: to compute with them there would be another
    graph, and what is saved is read where there is no such device.
    """
    if any(isinstance(one, torch.Tensor) and one.device.type == "xla" for one in pytree.tree_leaves(values)):
        _xla().sync()  # all at once; copied one by one, each would be a graph of its own
    return pytree.tree_map_only(torch.Tensor, lambda one: one.cpu() if one.device.type in COMPILING else one, values)


def kind_of(device: torch.device) -> str:
    """What computes: other hardware gives other last digits."""
    if device.type == "xla":
        return _xla().kind()
    if device.type == "tpu":
        return f"torch-tpu {torch.get_device_module(device).get_device_name(device)}"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"


def describe(device: torch.device) -> str:
    """The device in words, for logs and reports."""
    return f"CPU, threads: {torch.get_num_threads()}" if device.type == "cpu" else kind_of(device)
