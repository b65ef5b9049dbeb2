"""The one training loop. What differs between programs is `loss_fn` and the hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from utils import device as devices
from utils import dist, timeline
from utils.compiles import WatchCompiles
from utils.device import autocast
from utils.hooks import Hook
from utils.loader import seed_from, start
from utils.optim import Schedule, set_lr

Scalars = dict[str, torch.Tensor]
LossFn = Callable[[Any], tuple[Scalars, Scalars]]  # batch -> (losses to sum, other numbers to log)


@dataclass
class TrainState:
    """Where a training run is. `model` is the bare module: its state dict has no wrapper's prefix."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs finished
    batch: int = 0  # batches finished in the epoch that is under way
    step: int = 0  # optimizer steps finished
    start_step: int = 0  # the step at which this round began
    best: float | None = None  # best validation AP so far, over all rounds
    is_best: bool = False  # the newest epoch's is the best
    rows: list[dict[str, float]] = field(default_factory=list)  # each step's numbers, of the epoch under way
    summary: dict[str, float] = field(default_factory=dict)  # the newest epoch's numbers
    resumes: int = 0  # how often training went on from a checkpoint of its own
    inexact: list[str] = field(default_factory=list)  # what was another thing than before when it did
    # What there is to do, from `fit`:
    epochs: int = 0
    batches: int = 0  # of the epoch under way
    last_step: int = 0


def fit(
    state: TrainState,
    loader: DataLoader[Any],
    loss_fn: LossFn,
    hooks: Sequence[Hook],
    *,
    epochs: int,
    schedule: Schedule,
    seed: int,
    device: torch.device,
    precision: str,
) -> None:
    """Train until `epochs` epochs are finished in all, from wherever `state` is, within an epoch too.

    Random numbers drawn in a step depend on (seed, step, rank) only, so a resumed run draws the same ones.
    """
    batches: Any = loader.batch_sampler
    if device.type == "xla":
        hooks = [WatchCompiles(), *hooks]
    state.epochs, state.last_step = epochs, state.step + _steps_left(state, batches, epochs)
    computed = torch.cuda.Event() if device.type == "cuda" else None
    timeline.done("start-up", "model")
    with contextlib.ExitStack() as around:
        for hook in hooks:
            around.enter_context(hook.around(state))
        while state.epoch < epochs:
            batches.go_to(state.epoch, state.batch)
            state.batches = state.batch + len(batches)
            state.model.train()
            for hook in hooks:
                hook.before_epoch(state)
            timeline.done("compute")
            for batch in start(loader, device):
                timeline.done(_waited(computed))
                devices.seed(seed_from(seed, state.step, dist.rank()), device)
                set_lr(state.optimizer, schedule(state.epoch, state.step))
                with autocast(device, precision):
                    losses, numbers = loss_fn(batch)
                loss = torch.stack(list(losses.values())).sum()
                state.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                devices.step(state.optimizer, device)
                if computed:
                    computed.record()
                state.step += 1
                state.batch += 1
                for hook in hooks:
                    hook.after_step(state, {"loss": loss.detach(), **losses, **numbers})
                timeline.done("compute")
            for hook in hooks:
                hook.before_end(state)
            state.epoch += 1
            state.batch = 0
            for hook in hooks:
                hook.after_epoch(state)


def _steps_left(state: TrainState, batches: Any, epochs: int) -> int:
    steps = 0
    for epoch in range(state.epoch, epochs):
        batches.go_to(epoch, state.batch if epoch == state.epoch else 0)
        steps += len(batches)
    return steps


def _waited(computed: torch.cuda.Event | None) -> str:
    """The part that the wait for a batch belongs to: none is lost while the device still computes the steps before."""
    return "data wait" if computed is None or computed.query() else "compute"
