"""What a fine-tuning round can be told; the values are in configs/*.yaml, a file a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from utils import config
from utils.shared_config import COMPILING, DeviceName, OnError, ResNet, Sgd, Stage, Training

DEFAULT = Path(__file__).parent / "configs" / "r1.yaml"
FLAGS = {
    "--run-dir": "run_dir",
    "--dataset-root": "data.labeled",
    "--bp": "backbone",
    "--resume": "resume",
    "--lr": "optim.lr",
    "--batch-size": "batch_size",
    "--epochs": "epochs",
    "--workers": "workers",
}
LEVELS = 5  # of the feature pyramid that propose boxes
Head = Literal["rcnn", "dense"]
UNUSED = {"rcnn": (), "dense": ("min_size", "proposals_train", "box_batch_size")}  # keys of Model, by head
STRIDE = 32  # pixels, of the coarsest level of a ResNet


@dataclass(frozen=True, kw_only=True)
class Data:
    labeled: str  # squashfs archive or folder of the labelled set
    stage: Stage  # read the archive where it is, or copied whole; unpack it; mount it by squashfuse
    classes: str | None = None  # text file, a name a line; else the set's classes.txt, else its training labels
    on_error: OnError  # unusable images and labels: list them and end, or leave them out


@dataclass(frozen=True, kw_only=True)
class Model:
    """Arguments of `model.build`, which are also what a checkpoint says about its architecture.

    head=rcnn is Faster R-CNN. head=dense is a one-stage detector whose shapes never change, for devices that compile
    each shape they meet; it runs on all. Of the keys below it has no use for those in `UNUSED`.
    """

    head: Head
    backbone: ResNet
    trainable_layers: int  # 0 to 5 of layer4, layer3, layer2, layer1, conv1; the others keep their weights
    norm: Literal["frozen", "sync", "train"]  # BatchNorm statistics: as loaded, over all ranks, over each rank
    min_size: tuple[int, ...]  # shorter side after resizing, pixels; training draws one, evaluation has the last
    max_size: int  # bound of the longer side, pixels; dense: side of the square that an image is fitted into
    # rcnn: side of a square anchor, pixels after resizing, one per pyramid level. dense: a level has the boxes of which
    # no side is further than twice that from the place that predicts it, the last level all larger ones.
    anchor_sizes: tuple[int, ...]
    proposals_train: int  # proposals kept per image, of each level before and of all together after NMS
    proposals_test: int  # dense: candidates kept per image before NMS
    box_batch_size: int  # proposals per image in the box loss, at most a quarter with an object
    score_threshold: float  # detections below are dropped
    detections_per_image: int

    def architecture(self) -> dict[str, Any]:
        """What says how the model is built, without what its head has no use for."""
        return {key: value for key, value in asdict(self).items() if key not in UNUSED[self.head]}

    def problems(self) -> list[str]:
        counts = ("proposals_train", "proposals_test", "box_batch_size", "detections_per_image")
        sizes = self.min_size
        rules = [
            (0 <= self.trainable_layers <= LEVELS, f"trainable_layers={self.trainable_layers}: from 0 to 5"),
            (
                self.norm == "frozen" or self.trainable_layers == 5,
                f"norm={self.norm} needs trainable_layers=5, not {self.trainable_layers}: statistics of"
                " layers that keep their weights would drift; or norm=frozen",
            ),
            (
                "min_size" in UNUSED[self.head] or (bool(sizes) and 32 <= min(sizes) <= max(sizes) <= self.max_size),
                f"min_size={list(sizes)}, max_size={self.max_size}: one or more of 32 up to max_size",
            ),
            (
                len(self.anchor_sizes) == LEVELS and min(self.anchor_sizes) > 0,
                f"anchor_sizes={list(self.anchor_sizes)}: one above 0 for each of the {LEVELS} levels",
            ),
            (
                self.head != "dense" or self.max_size % STRIDE == 0,
                f"max_size={self.max_size}: the side of head=dense's squares is a multiple of {STRIDE}",
            ),
            (
                list(self.anchor_sizes) == sorted(set(self.anchor_sizes)) or self.head != "dense",
                f"anchor_sizes={list(self.anchor_sizes)}: with head=dense from small to large",
            ),
            (0 <= self.score_threshold < 1, f"score_threshold={self.score_threshold}: from 0 to below 1"),
            *((getattr(self, name) >= 1, f"{name}={getattr(self, name)}: at least 1") for name in counts),
        ]
        return [f"model.{message}" for holds, message in rules if not holds]


@dataclass(frozen=True, kw_only=True)
class Optim(Sgd):
    warmup_steps: int  # steps at the start of the round in which the rate rises to lr, where it stays

    def problems(self) -> list[str]:
        found = [] if self.warmup_steps >= 0 else [f"optim.warmup_steps={self.warmup_steps}: 0 or more"]
        return super().problems() + found


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    data: Data
    backbone: str | None = None  # ResNet weights to start from; see backbone.py for the formats
    init: str | None = None  # last checkpoint of the round before: weights, optimizer and epoch count go on
    best: str | None = None  # best checkpoint so far; it stays the best until an epoch here beats it
    model: Model
    optim: Optim

    def problems(self) -> list[str]:
        model = self.model
        has_weights = self.backbone or self.init or self.resume not in ("auto", "never")
        rules = [
            (
                has_weights or (model.norm != "frozen" and model.trainable_layers == 5),
                f"model.norm={model.norm}, model.trainable_layers={model.trainable_layers}: would keep random"
                " weights; give backbone or init, or set model.norm=train model.trainable_layers=5",
            ),
            (not (problem := refused(self.device, model.head)), problem),
            (not self.best or bool(self.init), "best: needs init, the checkpoint to go on from"),
        ]
        found = [message for holds, message in rules if not holds]
        return self.training_problems() + found + self.optim.problems() + model.problems()


def refused(device: DeviceName, head: str) -> str:
    """Why a detector cannot run on a device; empty if it can."""
    if head != "rcnn" or device not in COMPILING:
        return ""
    return (
        f"device={device}: Faster R-CNN (model.head=rcnn) does not run there: its shapes change with what is in the"
        " images, and each would be compiled; use model.head=dense, or jobs/two_stage.yaml"
    )


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line. Raises: InputError listing every problem."""
    line = config.parser("detect_train.train", FLAGS, DEFAULT, "Train a detector for one round.")
    return config.parse(Config, line, argv)
