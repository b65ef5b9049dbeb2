"""Where pretraining begins: random weights, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from ssl_train.config import Config
from ssl_train.model import MoCo
from utils import dist, optim, resume
from utils.device import place
from utils.engine import TrainState
from utils.errors import InputError, Stopped


def start(
    cfg: Config,
    device: torch.device,
    saved: Mapping[str, Any] | None,
    same_round: bool,
    conditions: Mapping[str, Any],
) -> TrainState:
    """The model and its optimizer, new or as `saved` left them. Raises: InputError when that is of another model."""
    torch.manual_seed(cfg.seed)  # the same first weights and queue on every rank
    model = place(MoCo(**asdict(cfg.model)), device)
    state = TrainState(model, optim.sgd(model, **asdict(cfg.optim)))
    if saved:
        if saved["architecture"] != architecture(cfg):
            raise InputError(f"the checkpoint's model is {saved['architecture']}, this run's {architecture(cfg)}")
        if saved["epochs_done"] >= cfg.epochs:
            raise InputError(f"epochs={cfg.epochs}: the checkpoint's {saved['epochs_done']} count too; give more")
        resume.restore(
            state,
            saved,
            same_round=same_round,
            conditions=conditions,
            allow_world_change=cfg.allow_world_change,
        )
    return state


T = TypeVar("T")


def all_or_none(make: Callable[[], T]) -> T:
    """What `make` returns on each rank. Raises: Stopped on every rank if a signal stopped it on one."""
    made: list[T] = []
    stopped = None
    try:
        made.append(make())
    except Stopped as error:
        stopped = error
    if dist.mean(torch.tensor(float(bool(made)))) < 1:
        raise stopped or Stopped("stopped by a signal to another rank; the same again goes on")
    return made[0]


def architecture(cfg: Config) -> dict[str, Any]:
    """What a checkpoint's weights are of; `bn_groups` is how they are trained."""
    return {name: value for name, value in asdict(cfg.model).items() if name != "bn_groups"}
