"""What the two parts of the two-stage detector can be told; the values are in configs/*.yaml, a file a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from detect_train.config import Data, Optim
from utils import config
from utils.shared_config import ResNet, Training

DEFAULT = Path(__file__).parent / "configs" / "unet.yaml"
FLAGS = {
    "--run-dir": "run_dir",
    "--dataset-root": "data.labeled",
    "--bp": "backbone",
    "--resume": "resume",
    "--lr": "optim.lr",
    "--batch-size": "batch_size",
    "--workers": "workers",
    "--test": "quick",
}
DIVISIBLE = 32  # the stride of a ResNet's last features


@dataclass(frozen=True, kw_only=True)
class Model:
    """Arguments of `model.build`, which are also what a checkpoint says about its architecture."""

    backbone: ResNet  # of both parts: the U-Net's way down, and the classifier
    side: int  # of the squares that images are fitted into, pixels
    width: int  # channels of the U-Net's finest level; each coarser one has twice as many
    proposals: int  # regions of an image that the U-Net names, always so many
    crop_side: int  # of a region as the classifier sees it, pixels
    samples: int  # regions of an image in a training step of the classifier
    score_threshold: float  # detections below are dropped
    overlap: float  # IoU at which the worse of two detections of a class is dropped
    detections_per_image: int

    def problems(self) -> list[str]:
        sides = ("side", "crop_side")
        counts = ("width", "proposals", "detections_per_image")
        places = (self.side // 4) ** 2
        rules = [
            *(
                (
                    getattr(self, name) >= DIVISIBLE and getattr(self, name) % DIVISIBLE == 0,
                    f"{name}={getattr(self, name)}: a multiple of {DIVISIBLE}",
                )
                for name in sides
            ),
            *((getattr(self, name) >= 1, f"{name}={getattr(self, name)}: at least 1") for name in counts),
            (self.proposals <= places, f"proposals={self.proposals}: side={self.side} has {places} places for them"),
            (
                2 <= self.samples <= self.proposals,
                f"samples={self.samples}: at least 2 and at most proposals={self.proposals}",
            ),
            (0 <= self.score_threshold < 1, f"score_threshold={self.score_threshold}: from 0 to below 1"),
            (0 <= self.overlap <= 1, f"overlap={self.overlap}: from 0 to 1"),
        ]
        return [f"model.{message}" for holds, message in rules if not holds]


@dataclass(frozen=True, kw_only=True)
class Iterations:
    """Training steps of a part."""

    pre: int  # first, in which the ResNet keeps the weights it was given and what is new learns to use them
    main: int  # then, in which all is trained

    @property
    def total(self) -> int:
        return self.pre + self.main

    def problems(self) -> list[str]:
        rules = [
            (self.pre >= 0, f"pre={self.pre}: 0 or more"),
            (self.main >= 1, f"main={self.main}: at least 1"),
        ]
        return [f"iterations.{message}" for holds, message in rules if not holds]


QUICK = Iterations(pre=2, main=4)  # enough to see that everything runs


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    part: Literal["unet", "classify"]
    data: Data
    backbone: str | None = None  # ResNet weights to start from; see detect_train/backbone.py for the formats
    unet: str | None = None  # checkpoint of part unet, whose regions part classify looks at
    model: Model
    optim: Optim  # lr until iterations.pre, after warmup_steps; from there on half a cosine to 0
    iterations: Iterations
    quick: bool  # 2 + 4 iterations instead: does everything run?
    validate_every: int  # epochs between two validations, one more after the last iteration
    epochs: int = 1  # not to be set: iterations say how many there are

    @property
    def planned(self) -> Iterations:
        return QUICK if self.quick else self.iterations

    def problems(self) -> list[str]:
        has_weights = self.backbone or self.resume not in ("auto", "never")
        rules = [
            (
                bool(has_weights) or not self.iterations.pre,
                f"iterations.pre={self.iterations.pre}: would keep random weights; give backbone, or set it to 0",
            ),
            (bool(self.unet) == (self.part == "classify"), f"part={self.part}: {UNET[self.part]}"),
            (self.validate_every >= 1, f"validate_every={self.validate_every}: at least 1"),
            (self.epochs == 1, f"epochs={self.epochs}: set iterations.main, from which it follows"),
        ]
        found = [message for holds, message in rules if not holds]
        parts = (self.optim, self.model, self.iterations)
        return self.training_problems() + found + [problem for part in parts for problem in part.problems()]


UNET = {"unet": "takes no unet", "classify": "needs unet, a checkpoint of part unet"}


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line. Raises: InputError listing every problem."""
    line = config.parser("detect_train.two_stage.train", FLAGS, DEFAULT, "Train a part of the two-stage detector.")
    return config.parse(Config, line, argv)
