"""The stand-in's configuration, with the keys that all programs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import config

FLAGS = {
    "--lr": "optim.lr",
    "--bp": "backbone",
    "--checkpoint-path": "checkpoint",
    "--resume": "resume",
    "--workers": "workers",
    "--run-dir": "run_dir",
}


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float


@dataclass(frozen=True, kw_only=True)
class Data:
    labeled: str | None = None
    fold: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    run_dir: str
    optim: Optim
    data: Data
    epochs: int
    batch_size: int
    workers: int = 0
    resume: str = "auto"
    backbone: str | None = None
    init: str | None = None
    best: str | None = None
    checkpoint: str | None = None
    ranks: Literal["none", "meet"] = "none"  # meet: all-reduce over the ranks
    fail: Literal["error", "disk", "kill", "segv"] | None = None  # raise; fill the disk; die of SIGKILL, of SIGSEGV
    fail_on_rank: int = 0
    wait_for: str | None = None  # a file; meanwhile it stops when it is asked to
    saves: bool = True  # a new checkpoint when it stops
    save_seconds: float = 0.0

    def problems(self) -> list[str]:
        return [f"epochs={self.epochs}: at least 1"] if self.epochs < 1 else []


def parse(argv: Sequence[str] | None) -> Config:
    default = Path(__file__).parent / "r1.yaml"
    return config.parse(Config, config.parser("standin", FLAGS, default, "A stand-in stage."), argv)
