"""What pretraining can be told; the values are in configs/*.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from utils import config
from utils.shared_config import ResNet, Sgd, Stage, Training

DEFAULT = Path(__file__).parent / "configs" / "mocov2_r50.yaml"
FLAGS = {
    "--run-dir": "run_dir",
    "--dataset-root": "data.unlabeled",
    "--resume": "resume",
    "--lr": "optim.lr",
    "--batch-size": "batch_size",
    "--epochs": "epochs",
    "--workers": "workers",
    "--test": "quick",
}
QUICK = 6  # steps


@dataclass(frozen=True, kw_only=True)
class Data:
    unlabeled: str  # squashfs archive or folder of PNG and JPEG images, at any depth
    stage: Stage  # read the archive where it is, or copied whole; unpack it; mount it by squashfuse
    cache: str | None = None  # folder for the images' pixels, decoded once, 150 KB each at 224x224; null: decode anew


@dataclass(frozen=True, kw_only=True)
class Model:
    arch: ResNet
    dim: int  # length of a query or key
    queue: int  # keys to contrast with, K; at least a batch, or its keys overwrite each other
    momentum: float  # of the key encoder, m
    temperature: float  # of the softmax, T
    bn_groups: int  # BatchNorm statistics of so many parts of each rank's batch, as if each were a GPU's


@dataclass(frozen=True, kw_only=True)
class Augment:
    backend: Literal["opencv", "device", "pil"]  # loader processes by OpenCV; the device; by Pillow, as published
    image_size: int  # side of a crop, pixels
    crop_scale: tuple[float, ...]  # least and greatest share of the image's area in a crop
    jitter: tuple[float, ...]  # strength of brightness, contrast, saturation and hue
    jitter_p: float  # the share of crops that is jittered; so for the two below
    grayscale_p: float
    blur_p: float
    blur_sigma: tuple[float, ...]  # least and greatest, pixels

    def problems(self) -> list[str]:
        scale, jitter, sigma = self.crop_scale, self.jitter, self.blur_sigma
        shares = {"jitter_p": self.jitter_p, "grayscale_p": self.grayscale_p, "blur_p": self.blur_p}
        rules = [
            (self.image_size >= 32, f"image_size={self.image_size}: at least 32"),
            (
                len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
                f"crop_scale={list(scale)}: two numbers, 0 < least <= greatest <= 1",
            ),
            (
                len(jitter) == 4 and min(jitter) >= 0 and max(jitter) <= 1 and jitter[3] <= 0.5,
                f"jitter={list(jitter)}: four numbers from 0 to 1, the last (hue) at most 0.5",
            ),
            (
                len(sigma) == 2 and 0 <= sigma[0] <= sigma[1],
                f"blur_sigma={list(sigma)}: two numbers, 0 <= least <= greatest",
            ),
            *((0 <= share <= 1, f"{name}={share}: from 0 to 1") for name, share in shares.items()),
        ]
        return [f"augment.{message}" for holds, message in rules if not holds]


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    data: Data
    model: Model
    augment: Augment
    optim: Sgd  # lr is the start of the cosine
    quick: bool  # one epoch of 6 steps instead: does everything run?

    def problems(self) -> list[str]:
        model = self.model
        rules = [
            (model.dim >= 1, f"model.dim={model.dim}: at least 1"),
            (model.queue >= self.batch_size, f"model.queue={model.queue}: at least batch_size={self.batch_size}"),
            (0 <= model.momentum < 1, f"model.momentum={model.momentum}: from 0 to below 1"),
            (model.temperature > 0, f"model.temperature={model.temperature}: above 0"),
            (
                model.bn_groups >= 1 and self.batch_size % model.bn_groups == 0,
                f"model.bn_groups={model.bn_groups}: at least 1, and batch_size={self.batch_size} a multiple of it",
            ),
        ]
        found = [message for holds, message in rules if not holds]
        return self.training_problems() + found + self.optim.problems() + self.augment.problems()


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line. Raises: InputError listing every problem."""
    line = config.parser("ssl_train.train", FLAGS, DEFAULT, "Pretrain a ResNet with MoCo-v2, without labels.")
    parsed = config.parse(Config, line, argv)
    return replace(parsed, epochs=1) if parsed.quick else parsed
