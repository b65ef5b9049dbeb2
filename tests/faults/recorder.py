"""Run a training program and write down what every step left: the proof that a resumed run is the same run.

    python -m tests.faults.recorder RECORD [--kill 7] [--break step-seed] ssl_train.train --run-dir ...

RECORD gets a line of JSON a step, from rank 0: the step, its losses in hexadecimal, and the sha256 of model and
optimizer after it. `--kill N` ends every rank with SIGKILL after step N, before anything is saved there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_train import augment
from utils import device, dist, engine, hooks, loader
from utils.errors import cli
from utils.loader import seed_from

BREAKS = ("step-seed", "rank-seed", "item-seed")


def digest(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a model's and an optimizer's state."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                total.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            total.update(repr(value).encode())

    add(model)
    add(optimizer)
    return total.hexdigest()


def record_steps(file: Path, kill_after: int | None) -> None:
    """Have every training in this process write its steps to `file`."""
    after_step = hooks.LogMetrics.after_step

    def recorded(self: hooks.LogMetrics, state: engine.TrainState, numbers: dict[str, torch.Tensor]) -> None:
        losses = {name: float(dist.mean(value.detach().float())) for name, value in numbers.items()}
        if dist.rank() == 0:
            now = digest(state.model.state_dict(), state.optimizer.state_dict())
            line = {"step": state.step, "digest": now, "finite": all(map(math.isfinite, losses.values()))}
            with open(file, "a") as record:
                record.write(json.dumps(line | {name: value.hex() for name, value in losses.items()}) + "\n")
        if state.step == kill_after:
            dist.barrier()  # rank 0 has written
            os.kill(os.getpid(), signal.SIGKILL)
        after_step(self, state, numbers)

    hooks.LogMetrics.after_step = recorded  # type: ignore[method-assign]


def break_seeds(what: str) -> None:
    """Switch off one of the rules that make a resumed run the same run."""
    if what == "step-seed":  # a step's random numbers come from wherever the process's generator is
        device.seed = lambda number, device: None
    elif what == "rank-seed":  # every rank draws what rank 0 draws
        engine.seed_from = lambda *numbers: seed_from(*numbers[:2], 0)
    elif what == "item-seed":  # an item's random numbers come from wherever its worker's generators are

        @contextlib.contextmanager
        def unseeded(*numbers: int) -> Iterator[None]:
            yield

        loader.seeded = unseeded
        augment.Streams.at = lambda self, index, which: np.random.default_rng()  # type: ignore[method-assign]
    else:
        raise ValueError(f"{what}: one of {BREAKS}")


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a record; one torn by a kill is left out."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.faults.recorder", allow_abbrev=False)
    parser.add_argument("record", type=Path)
    parser.add_argument("--kill", type=int, metavar="STEP")
    parser.add_argument("--break", dest="broken", choices=BREAKS)
    parser.add_argument("module")
    arguments, words = parser.parse_known_args()
    record_steps(arguments.record, arguments.kill)
    if arguments.broken:
        break_seeds(arguments.broken)
    importlib.import_module(arguments.module).main(words)


if __name__ == "__main__":
    cli(main)
