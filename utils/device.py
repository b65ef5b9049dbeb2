"""CPU and CUDA behind a handful of verbs."""

from __future__ import annotations

import contextlib
import os
from typing import Literal, TypeVar

import torch
from torch import nn

from utils.errors import EnvironmentProblem
from utils.shared_config import DeviceName, Precision

Module = TypeVar("Module", bound=nn.Module)


def pick(name: DeviceName, local_rank: int) -> torch.device:
    """The device of this rank: `auto` is CUDA when there is any. Raises: EnvironmentProblem, never a fallback."""
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


def place(model: Module, device: torch.device) -> Module:
    """`model` on `device`, the weights of convolutions in channels_last: the faster format for float32 and bf16."""
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
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )  # fmt: skip
    return "bf16" if native else "float32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """bf16 autocast when `precision` says so; weights, optimizer and losses stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def kind_of(device: torch.device) -> str:
    """What computes: other hardware gives other last digits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"


def describe(device: torch.device) -> str:
    """The device in words, for logs and reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
