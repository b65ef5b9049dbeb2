"""What happens around the training loop: methods that do nothing, and the hook that writes its numbers."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from utils import dist, log, metrics_csv, progress, timeline
from utils.device import on_host
from utils.errors import DivergedError
from utils.metrics import MetricsWriter, Since

if TYPE_CHECKING:
    from utils.engine import TrainState

SHOWN = 8  # names in a message


class Hook:
    """A hook overrides what it needs. Hooks run in the order they are given."""

    def around(self, state: TrainState) -> contextlib.AbstractContextManager[object]:
        """What holds from before the first epoch until training ends, whatever ends it."""
        return contextlib.nullcontext()

    def before_epoch(self, state: TrainState) -> None: ...

    def after_step(self, state: TrainState, numbers: dict[str, torch.Tensor]) -> None: ...

    def before_end(self, state: TrainState) -> None:
        """All batches of the epoch are done, and it does not count as finished yet: a run may stop and go on here."""

    def after_epoch(self, state: TrainState) -> None: ...


class LogMetrics(Hook):
    """Fetches the numbers of each step from the device every `every` steps, averages them over ranks, writes them.

    Args:
        files: the image files of all ranks in one batch, as messages show them, from (epoch, batch).

    Raises: DivergedError on every rank at the next fetch after a loss is not finite, naming the step and its
    files; a checkpoint is saved after a fetch, so none holds such weights.
    """

    def __init__(
        self, writer: MetricsWriter, *, every: int, batch_size: int, files: Callable[[int, int], Sequence[str]]
    ) -> None:
        self.writer, self.every, self.batch_size, self.files = writer, every, batch_size, files
        self.pending: list[dict[str, torch.Tensor]] = []
        self.last = self.epoch = self.first = Since.now(0)  # record; beginning of the epoch; step of this process
        self.is_warm = False

    def around(self, state: TrainState) -> contextlib.AbstractContextManager[object]:
        self.first, name = Since.now(state.step), self.writer.run_dir.path.name
        self.progress = progress.Training(name, state.epochs, state.last_step, is_shown=dist.rank() == 0)
        return self.progress

    def before_epoch(self, state: TrainState) -> None:
        self.last = self.epoch = Since.now(state.step)

    def after_step(self, state: TrainState, numbers: dict[str, torch.Tensor]) -> None:
        timeline.first_step()
        self.progress.step(state.epoch, state.step)
        self.pending.append({name: value.detach() for name, value in numbers.items()})
        if state.batch % self.every == 0:
            self._write(state, self.every)
        if not self.is_warm:  # how long the first step takes says nothing of the others
            self.is_warm, self.first = True, Since.now(state.step)

    def before_end(self, state: TrainState) -> None:
        if rest := state.batch % self.every:
            self._write(state, rest)
        self.check_weights(state)  # before a validation fails for them
        averages = {f"{name}_avg": statistics.fmean(row[name] for row in state.rows) for name in state.rows[0]}
        state.summary = averages | {"loss_median": statistics.median(row["loss"] for row in state.rows)}
        if dist.rank() == 0:
            rates = self.epoch.rates(state.step, self.batch_size) | {"seconds": timeline.clock() - self.epoch.at}
            lr = state.optimizer.param_groups[0]["lr"]
            self.writer.write("epoch", epoch=state.epoch, step=state.step, lr=lr, **rates, **state.summary)
        timeline.done("compute")

    def after_epoch(self, state: TrainState) -> None:
        state.rows = []
        if dist.rank() == 0:
            metrics_csv.write_log(self.writer.run_dir)

    def fetch(self, state: TrainState) -> None:
        """Bring `state.rows` up to date. Raises: DivergedError if a loss, or a weight now, is not finite."""
        if self.pending:
            names = list(self.pending[0])
            rows = on_host(self.pending)
            table = dist.mean(torch.stack([torch.stack([row[name].float() for name in names]) for row in rows]))
            self.pending = []
            for values in table.tolist():
                if not all(map(math.isfinite, values)):
                    raise DivergedError(self._diagnosis(state, dict(zip(names, values, strict=True))))
                state.rows.append(dict(zip(names, values, strict=True)))

    def check_weights(self, state: TrainState) -> None:
        """Raises: DivergedError on every rank. The losses so far are of the weights before the last step."""
        finite = torch.stack([value.isfinite().all() for value in on_host(state.model.state_dict()).values()])
        if dist.mean(finite.all().float()) < 1:
            raise DivergedError(f"weights are not finite after step {state.step}; lower optim.lr")

    def _diagnosis(self, state: TrainState, row: dict[str, float]) -> str:
        batch = len(state.rows)
        step = state.step - state.batch + batch + 1
        names = self.files(state.epoch, batch)
        log.info(f"images of step {step}: {', '.join(names)}")
        more = f" and {len(names) - SHOWN} more, see the log" if len(names) > SHOWN else ""
        values = ", ".join(f"{name}={value:g}" for name, value in row.items())
        where = f"step {step} (epoch {state.epoch})"
        return f"loss is not finite at {where}: {values}; lower optim.lr. Its images: {', '.join(names[:SHOWN])}{more}"

    def _write(self, state: TrainState, count: int) -> None:
        self.fetch(state)
        rows = state.rows[-count:]
        averages = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        left = self.first.left(state.step, state.last_step)
        rates = {**self.last.rates(state.step, self.batch_size), "left_s": left}
        lr = state.optimizer.param_groups[0]["lr"]
        if dist.rank() == 0:
            steps = {"steps": state.last_step}
            self.writer.write("train", epoch=state.epoch, step=state.step, lr=lr, **rates, **steps, **averages)
        is_last = state.batch == state.batches
        self.progress.numbers(state.epoch, state.step, averages, lr, rates, is_last=is_last)
        self.last = Since.now(state.step)
