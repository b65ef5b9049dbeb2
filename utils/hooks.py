"""What happens around the training loop: three methods that do nothing, and the two hooks every program uses."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils import checkpoint, dist, log
from utils.errors import DivergedError
from utils.metrics import MetricsWriter

if TYPE_CHECKING:
    from utils.engine import TrainState


class Hook:
    """A hook overrides what it needs. Hooks run in the order they are given."""

    def before_epoch(self, state: TrainState) -> None: ...

    def after_step(self, state: TrainState, numbers: dict[str, torch.Tensor]) -> None: ...

    def after_epoch(self, state: TrainState) -> None: ...


class LogMetrics(Hook):
    """Fetches the numbers of each step from the device every `every` steps, averages them over ranks, writes them.

    Raises: DivergedError on every rank at the next fetch after a loss is not finite, naming the step;
    an epoch's checkpoint is saved after its last fetch, so none holds such weights.
    """

    def __init__(self, writer: MetricsWriter, *, every: int, batch_size: int) -> None:
        self.writer, self.every, self.batch_size = writer, every, batch_size
        self.pending: list[dict[str, torch.Tensor]] = []
        self.epoch_rows: list[dict[str, float]] = []
        self.since = time.monotonic()

    def before_epoch(self, state: TrainState) -> None:
        self.epoch_rows = []
        self.since = time.monotonic()

    def after_step(self, state: TrainState, numbers: dict[str, torch.Tensor]) -> None:
        self.pending.append({name: value.detach() for name, value in numbers.items()})
        if len(self.pending) == self.every:
            self._flush(state, state.epoch)

    def after_epoch(self, state: TrainState) -> None:
        if self.pending:
            self._flush(state, state.epoch - 1)
        # The losses are of the weights before the last step.
        if not torch.stack([value.isfinite().all() for value in state.model.state_dict().values()]).all():
            raise DivergedError(f"weights are not finite after step {state.step}; lower optim.lr")
        averages = {
            f"{name}_avg": statistics.fmean(row[name] for row in self.epoch_rows) for name in self.epoch_rows[0]
        }
        state.summary = averages | {"loss_median": statistics.median(row["loss"] for row in self.epoch_rows)}

    def _flush(self, state: TrainState, epoch: int) -> None:
        names = list(self.pending[0])
        table = dist.mean(torch.stack([torch.stack([row[name].float() for name in names]) for row in self.pending]))
        rows = table.tolist()
        steps = range(state.step - len(rows) + 1, state.step + 1)
        for step, row in zip(steps, rows, strict=True):
            if not all(map(math.isfinite, row)):
                values = ", ".join(f"{name}={value:g}" for name, value in zip(names, row, strict=True))
                raise DivergedError(f"loss is not finite at step {step} (epoch {epoch}): {values}; lower optim.lr")
        self.epoch_rows += [dict(zip(names, row, strict=True)) for row in rows]
        averages = dict(zip(names, map(statistics.fmean, zip(*rows, strict=True)), strict=True))
        rate = len(rows) * self.batch_size / (time.monotonic() - self.since)
        lr = state.optimizer.param_groups[0]["lr"]
        if dist.rank() == 0:
            self.writer.write("train", epoch=epoch, step=state.step, lr=lr, images_per_s=rate, **averages)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in averages.items())
        log.info(f"epoch {epoch}  step {state.step}  {shown}  lr {lr:.2g}  {rate:.1f} images/s")
        self.pending, self.since = [], time.monotonic()


class SaveCheckpoints(Hook):
    """Saves `payload(state)` after each epoch, on rank 0 while the others wait."""

    def __init__(self, directory: Path, payload: Callable[[TrainState], dict[str, Any]]) -> None:
        self.directory, self.payload = directory, payload

    def after_epoch(self, state: TrainState) -> None:
        if dist.rank() == 0:
            checkpoint.save(self.directory, self.payload(state), best=state.is_best)
        dist.barrier()
