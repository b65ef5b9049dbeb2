"""What a checkpoint costs: the time of a save against the time of the steps between two saves.

    python -m bench.checkpoint [--program moco] [--steps 5] [--saves 5]

Prints the median save of the reference models (ResNet-50 MoCo with its queue, Faster R-CNN-FPN with ResNet-50), its
ratio to a bare `torch.save` of the same content without a hash, flush or rename, and its share of the time at the
shipped `checkpoint.every_minutes`. A step's time is measured too, for a share by steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import detect_train.config
import ssl_train.config
from detect_train import model as detector
from detect_train.targets import Targets, pad
from ssl_train.model import MoCo
from utils import checkpoint, engine, optim
from utils.device import describe, kind_of
from utils.paths import RunDir
from utils.shared_config import Training

Program = tuple[Training, engine.TrainState, Callable[[], torch.Tensor]]


def moco(device: torch.device) -> Program:
    """The reference pretraining, and its loss of 8 random images a step."""
    cfg = ssl_train.config.parse(["--run-dir", "bench", "--dataset-root", "bench"])
    model = MoCo(**asdict(cfg.model)).to(device)
    size = cfg.augment.image_size

    def loss() -> torch.Tensor:
        views = (torch.randn(8, 3, size, size, device=device) for _ in range(2))
        logits, labels = model(*views, torch.arange(8, device=device))
        return F.cross_entropy(logits, labels)

    return cfg, engine.TrainState(model, optim.sgd(model, **asdict(cfg.optim))), loss


def rcnn(device: torch.device) -> Program:
    """The reference round 1 with 100 classes, and its loss of 1 random image a step."""
    cfg = detect_train.config.parse(["--run-dir", "bench", "--dataset-root", "bench", "--bp", "bench"])
    model = detector.build(num_classes=101, **asdict(cfg.model)).to(device)
    target = {"boxes": torch.tensor([[50.0, 50, 200, 200]]), "labels": torch.tensor([1])}
    targets = Targets(*(part.to(device) for part in pad([target])))
    settings = {name: value for name, value in asdict(cfg.optim).items() if name != "warmup_steps"}

    def loss() -> torch.Tensor:
        losses = model([torch.rand(3, 375, 500, device=device)], targets)
        return torch.stack(list(losses.values())).sum()

    return cfg, engine.TrainState(model, optim.sgd(model, **settings)), loss


def seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """The median time of `work`."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def measure(name: str, steps: int, saves: int, device: torch.device) -> str:
    """One line about a program."""
    cfg, state, loss = {"moco": moco, "rcnn": rcnn}[name](device)
    state.model.train()

    def step() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        loss().backward()
        state.optimizer.step()
        state.step += 1

    step()
    a_step = seconds(step, steps, device)
    state.batch = state.step
    content: dict[str, Any] = checkpoint.payload(name, state=state, architecture={}, config={}, conditions={})
    with tempfile.TemporaryDirectory() as folder:
        bare = seconds(lambda: torch.save(content, f"{folder}/bare.pth"), saves, device)
        save = seconds(lambda: checkpoint.save(RunDir(Path(folder)), content), saves, device)
        size = (Path(folder) / "bare.pth").stat().st_size / 2**20
    between = 60 * cfg.checkpoint.every_minutes
    return (
        f"{name}: {size:.0f} MiB, save {save:.2f} s ({save / bare:.2f} times torch.save's {bare:.2f} s), "
        f"{save / between:.2%} of the {between / 60:g} minutes between two; a step here {a_step:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.checkpoint", description="What a checkpoint costs.")
    parser.add_argument("--program", choices=("moco", "rcnn"), action="append")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--saves", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {kind_of(device)}, {describe(device)}")
    for name in arguments.program or ("moco", "rcnn"):
        print(measure(name, arguments.steps, arguments.saves, device), flush=True)


if __name__ == "__main__":
    main()
