"""What the configurations of several programs have in common. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ResNet = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
OnError = Literal["error", "skip"]  # unusable data: list it and end, or leave out exactly that
Stage = Literal["direct", "unpack", "mount"]  # what is done with an archive of data, see utils/squashfs.py
DeviceName = Literal["auto", "cpu", "cuda", "xla", "tpu"]
COMPILING = ("xla", "tpu")  # devices that compile each shape they meet, which takes seconds to minutes
# Where and how fast a stage runs, never which result it has: what is done stays done when these change.
MACHINE_KEYS = frozenset(
    {"run_dir", "resume", "device", "workers", "log_every", "collective_timeout", "allow_world_change"}
    | {"checkpoint.every_steps", "checkpoint.every_minutes", "data.stage", "data.cache", "evaluator"}
)
FILE_KEYS = ("backbone", "init", "best", "resume", "unet", "checkpoint")  # weights and checkpoints, files or URLs
Precision = Literal["auto", "float32", "bf16"]  # of the forward pass; weights stay float32


@dataclass(frozen=True, kw_only=True)
class Sgd:
    lr: float  # for the global batch; the program says how it goes on from there
    momentum: float
    weight_decay: float

    def problems(self) -> list[str]:
        rules = [
            (self.lr > 0, f"lr={self.lr}: above 0"),
            (0 <= self.momentum < 1, f"momentum={self.momentum}: from 0 to below 1"),
            (self.weight_decay >= 0, f"weight_decay={self.weight_decay}: 0 or more"),
        ]
        return [f"optim.{message}" for holds, message in rules if not holds]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When a checkpoint is saved, besides after each epoch and before a job ends."""

    every_steps: int  # 0: not by steps
    every_minutes: float  # 0: not by time

    def problems(self) -> list[str]:
        values = {"every_steps": self.every_steps, "every_minutes": self.every_minutes}
        return [f"checkpoint.{name}={value}: 0 or more" for name, value in values.items() if not value >= 0]


@dataclass(frozen=True, kw_only=True)
class Training:
    run_dir: str  # where config, metrics and checkpoints go
    batch_size: int  # images in one step of all ranks together
    epochs: int  # in all: those of a resumed run and of the rounds before included
    seed: int
    workers: int  # loader processes of each rank; 0: none
    log_every: int  # steps between two lines of metrics
    resume: str  # auto: this run's newest checkpoint; never; or a checkpoint's path
    device: DeviceName
    precision: Precision  # auto: bf16 where the hardware computes in it
    deterministic: bool  # CUDA: the same bits in each run, slower; the CPU gives them anyway
    checkpoint: Checkpoint
    allow_world_change: bool  # go on with another number of ranks: same batches, other last digits
    collective_timeout: float  # seconds without an answer after which a rank or loader process counts as lost

    def training_problems(self) -> list[str]:
        rules = [
            (self.batch_size >= 1, f"batch_size={self.batch_size}: at least 1"),
            (self.epochs >= 1, f"epochs={self.epochs}: at least 1"),
            (self.seed >= 0, f"seed={self.seed}: 0 or more"),
            (self.workers >= 0, f"workers={self.workers}: 0 or more"),
            (self.log_every >= 1, f"log_every={self.log_every}: at least 1"),
            (self.collective_timeout > 0, f"collective_timeout={self.collective_timeout}: above 0"),
        ]
        return [message for holds, message in rules if not holds] + self.checkpoint.problems()
