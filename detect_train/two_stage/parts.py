"""Where a part begins, which batches it sees until its last iteration, and how fast it learns in each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from detect_train.backbone import load_backbone
from detect_train.rounds import check_same
from detect_train.two_stage.classifier import CropClassifier
from detect_train.two_stage.config import Config, Iterations
from detect_train.two_stage.model import TwoStage, build
from detect_train.two_stage.unet import UNet
from utils import checkpoint, loader, log, optim, resume
from utils.device import place
from utils.engine import TrainState
from utils.errors import InputError
from utils.optim import Schedule

KINDS = {"unet": "unet", "classify": "detector"}  # of the parts' checkpoints
REMEDY = "give a checkpoint of detect_train.two_stage; backbone weights go to --bp"
OF_UNET = ("backbone", "side", "width", "proposals")  # of the architecture


def architecture(cfg: Config, classes: int) -> dict[str, Any]:
    """Everything needed to build the part's model again."""
    model = dict(vars(cfg.model))
    if cfg.part == "unet":
        return {"head": "unet", **{key: model[key] for key in OF_UNET}}
    return {"head": "two_stage", "num_classes": 1 + classes, **model}


def start(
    cfg: Config,
    identity: Mapping[str, Any],
    saved: Mapping[str, Any] | None,
    same_round: bool,
    conditions: Mapping[str, Any],
    device: torch.device,
) -> TrainState:
    """The part's model and its optimizer as `saved` left them, or new with the weights of the stages before.

    Args:
        identity: `architecture` and `classes`, as in its checkpoints.
    """
    torch.manual_seed(cfg.seed)  # the same first weights on every rank
    kwargs = {key: value for key, value in identity["architecture"].items() if key != "head"}
    model: Any = UNet(**kwargs) if cfg.part == "unet" else build(**kwargs)
    trained = model if cfg.part == "unet" else model.classifier
    if saved is None:
        if cfg.unet:
            load_unet(model, Path(cfg.unet), identity["architecture"])
        if cfg.backbone:
            load_backbone(trained, Path(cfg.backbone))
    model.to(device)
    if conditions["precision"] == "bf16":  # before momenta are loaded; in float32 the U-Net's way up is slower for it
        place(model, device)
    how = {"lr": cfg.optim.lr, "momentum": cfg.optim.momentum, "weight_decay": cfg.optim.weight_decay}
    state = TrainState(model, optimizer(trained, **how))
    if saved:
        check_same(identity, saved)
        world = cfg.allow_world_change
        resume.restore(state, saved, same_round=same_round, conditions=conditions, allow_world_change=world)
        if state.step > cfg.planned.total or (state.step == cfg.planned.total and not state.batch):
            raise InputError(f"iterations: {cfg.planned.total} in all, and {state.step} are done already; give more")
        log.info(f"going on after {state.step} iterations")
    hold_backbone(state, cfg.planned.pre)
    return state


def optimizer(trained: UNet | CropClassifier, **how: float) -> torch.optim.SGD:
    """SGD over what is new, its first group, and over the ResNet. Args: how: `optim.sgd`'s."""
    sgd = optim.sgd(trained.new_parts(), **how)
    sgd.add_param_group({"params": list(trained.backbone.parameters())})
    return sgd


def load_unet(model: TwoStage, path: Path, ours: Mapping[str, Any]) -> None:
    """Give the detector its first stage. Raises: InputError when it was trained with other values."""
    checkpoint.check(path)
    saved = checkpoint.load(path, "unet", "give the last checkpoint of part unet")
    theirs = saved["architecture"]
    if differing := [f"{key} {theirs[key]} there, {ours[key]} here" for key in OF_UNET if theirs[key] != ours[key]]:
        raise InputError(f"unet {path} is another one: {'; '.join(differing)}")
    model.unet.load_state_dict(saved["model"])


def hold_backbone(state: TrainState, pre: int) -> None:
    """Keep the ResNet's weights, the optimizer's second group, until iteration `pre`: their learning rate is 0.

    Not by their gradients: these are the same operations in every step, for what compiles them and for DDP.
    """

    def hold(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if state.step < pre:
            optimizer.param_groups[1]["lr"] = 0.0

    state.optimizer.register_step_pre_hook(hold)


def schedule(lr: float, warmup_steps: int, planned: Iterations) -> Schedule:
    """`lr` while the ResNet is held, then half a cosine to 0; the first `warmup_steps` rise to it."""

    def rate(epoch: int, step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        done = max(0, step - planned.pre) / planned.main
        return lr * warm * 0.5 * (1 + math.cos(math.pi * done))

    return rate


class Until(loader.GlobalBatches):
    """Batches until iteration `total`: the last epoch may be a short one."""

    def __init__(self, length: int, batch_size: int, seed: int, *, total: int, state: TrainState) -> None:
        super().__init__(length, batch_size, seed)
        self.total, self.since = total, (state.epoch, state.step - state.batch)

    def __len__(self) -> int:
        epoch, step = self.since
        whole = self.length // self.batch_size
        return min(whole, self.total - step - (self.epoch - epoch) * whole) - self.done

    @property
    def epochs(self) -> int:
        """How many there are, those before included."""
        epoch, step = self.since
        return epoch - (step - self.total) // (self.length // self.batch_size)
