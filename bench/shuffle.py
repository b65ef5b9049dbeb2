"""Shuffling BN between ranks: by index in the loader with one gather of keys, against the published exchange of images.

    python -m bench.shuffle [--images 32] [--side 224] [--rounds 20]

Two ranks over gloo on one machine, wall time in the training process besides the encoder. The images a rank has are
float32 when they are exchanged, as published. What it costs elsewhere: a rank's loader decodes the images of its
queries and of its keys, with R ranks 2 - 1/R times as many; a cache of decoded images makes that free.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import distributed

from bench import measure
from bench.peers import published_moco
from ssl_train.batches import ShuffledBatches
from utils import dist

RANKS, DIM, GOAL = 2, 128, 50


def rank(images: int, side: int, rounds: int) -> None:
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    batches = ShuffledBatches(RANKS * images * 4, RANKS * images, 0, 1)
    mine = torch.randn(images, 3, side, side)
    keys = torch.nn.functional.normalize(torch.randn(images, DIM), dim=1)  # what the encoder would give

    def by_index() -> torch.Tensor:
        share = next(iter(batches))
        shuffled = dist.gather(keys)
        return torch.empty_like(shuffled).index_copy_(0, torch.from_numpy(share.order), shuffled)

    def exchanged() -> torch.Tensor:
        _, back = published_moco.shuffle(mine)
        return published_moco.gathered(published_moco.unshuffle(keys, back))

    ours, theirs, ratio = measure.race(by_index, exchanged, rounds=rounds, clock=measure.wall)
    if distributed.get_rank() == 0:
        claim = f"shuffling BN of {RANKS} x {images} images of {side} px, a step"
        row = measure.Row(claim, f"{1e3 * ours:.2f} ms", f"{1e3 * theirs:.1f} ms", ratio, GOAL)
        measure.report("shuffle: by index and one gather of keys, against an exchange of images (gloo)", [row])
    distributed.destroy_process_group()


def main() -> None:
    words = measure.arguments(__doc__, images=32, side=224, rounds=20)
    if "RANK" in os.environ:
        rank(words.images, words.side, words.rounds)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", "bench.shuffle"]
    done = subprocess.run(
        [sys.executable, *launcher, *sys.argv[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
