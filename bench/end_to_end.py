"""Training from an archive against the same step on batches that are in memory already.

    python -m bench.end_to_end [--cores 2] [--steps 4] [--rounds 3]

MoCo-v2 at 224 pixels by the loop, the loader and the augmentation of pretraining, on one core and on so many: on a GPU
the reference recipe, on the CPU ResNet-18 and a batch of 16. Wall time. What the ratio lacks to 1 is waiting for data.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssl_train.config
from bench import measure
from ssl_train.batches import ShuffledBatches
from ssl_train.data import Batch, Views
from ssl_train.start import start
from ssl_train.train import contrastive_loss
from utils import engine, env, loader, optim, squashfs
from utils.device import describe, pick, resolve_precision
from utils.image_cache import Decoded
from utils.sample_data import UNLABELED, Sample, make

SAMPLE = Sample(unlabeled=512, training=1, validation=1, size=374)  # pictures of 224 pixels for pretraining
ON_A_GPU = 40  # steps: the first batch, which nothing hides, must not count for much
GOAL = 0.95


class Again(Decoded):
    """The images over and over: as many as are asked for."""

    def pixels(self, index: int) -> np.ndarray:
        return super().pixels(index % len(self))


class InMemory:
    """What `engine.fit` asks of a loader, over the same few batches again and again."""

    def __init__(self, batches: list[Batch], steps: int) -> None:
        self.batches, self.steps, self.batch_sampler, self.num_workers = batches, steps, self, 0

    def go_to(self, epoch: int, done: int) -> None: ...

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches[step % len(self.batches)] for step in range(self.steps))


def run(cores: int, steps: int, rounds: int, archive: Path) -> tuple[float, float, float]:
    """Images a second from the archive and in memory, and the median of their ratio, on the first `cores` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    device = pick("auto", env.world())
    small = [] if device.type == "cuda" else ["batch_size=16", "model.arch=resnet18"]
    cfg = ssl_train.config.parse(["--run-dir", "bench", "--dataset-root", str(archive), *small])
    workers = cores - 1
    if device.type == "cpu":
        torch.set_num_threads(max(1, cores - workers))
    tree = squashfs.stage(archive, archive.parent / "staged", None, cfg.data.stage)
    views = Views(Again(tree), seed=cfg.seed, **asdict(cfg.augment))
    steps = ON_A_GPU if device.type == "cuda" else steps
    batches = ShuffledBatches(steps * cfg.batch_size, cfg.batch_size, cfg.seed, cfg.model.bn_groups)
    real = loader.make(views, batches, workers=workers, device=device, collate=loader.whole)
    kept = list(itertools.islice(loader.start(real), 4))
    state = start(cfg, device, None, False, {})

    def epoch(source: Any) -> None:
        engine.fit(
            state,
            source,
            contrastive_loss(state.model, device),
            [],
            epochs=state.epoch + 1,
            schedule=optim.cosine(cfg.optim.lr, cfg.epochs),
            seed=cfg.seed,
            device=device,
            precision=resolve_precision(cfg.precision, device),
        )
        if device.type == "cuda":
            torch.cuda.synchronize()

    mine, theirs, ratio = measure.race(
        lambda: epoch(real), lambda: epoch(InMemory(kept, steps)), rounds=rounds, clock=measure.wall
    )
    images = steps * cfg.batch_size
    return images / mine, images / theirs, ratio


def main() -> None:
    asked = measure.arguments(__doc__, cores=len(os.sched_getaffinity(0)), steps=4, rounds=3, alone=0)
    with tempfile.TemporaryDirectory() as folder:
        if asked.alone:
            print(*run(asked.cores, asked.steps, asked.rounds, Path(os.environ["ARCHIVE"])))
            return
        make(Path(folder), SAMPLE)
        on_a_gpu = pick("auto", env.world()).type == "cuda"
        rows = []
        for cores in sorted({1, asked.cores}):
            words = ["--alone", "1", "--cores", str(cores), "--steps", str(asked.steps), "--rounds", str(asked.rounds)]
            done = subprocess.run(
                [sys.executable, "-m", "bench.end_to_end", *words],
                env={**os.environ, "ARCHIVE": str(Path(folder) / UNLABELED)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            ours, memory, ratio = map(float, done.stdout.split()[-3:])
            rows.append(
                measure.Row(
                    f"{cores} cores",
                    f"{ours:.1f} images/s",
                    f"{memory:.1f} images/s",
                    ratio,
                    None if cores == 1 and on_a_gpu else GOAL,
                )
            )
    used = describe(pick("auto", env.world()))
    measure.report(f"Training from an archive, against the same step in memory ({used})", rows)


if __name__ == "__main__":
    main()
