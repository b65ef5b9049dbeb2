"""What happens around the training loop: methods that do nothing, and the two hooks every program uses."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from utils import checkpoint, dist, log, startup, stop, upload
from utils.device import on_host
from utils.errors import DivergedError, Stopped
from utils.metrics import MetricsWriter
from utils.paths import RunDir
from utils.shared_config import Checkpoint, Training

if TYPE_CHECKING:
    from utils.engine import TrainState

SHOWN = 8  # names in a message
LONG_SAVE = 0.1  # share of the time between two saves


class Hook:
    """A hook overrides what it needs. Hooks run in the order they are given."""

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
        self.since = time.monotonic()

    def before_epoch(self, state: TrainState) -> None:
        startup.done("model")
        self.since = time.monotonic()

    def after_step(self, state: TrainState, numbers: dict[str, torch.Tensor]) -> None:
        startup.first_step()
        self.pending.append({name: value.detach() for name, value in numbers.items()})
        if state.batch % self.every == 0:
            self._write(state, self.every)

    def before_end(self, state: TrainState) -> None:
        if rest := state.batch % self.every:
            self._write(state, rest)
        self.check_weights(state)  # before a validation fails for them
        averages = {f"{name}_avg": statistics.fmean(row[name] for row in state.rows) for name in state.rows[0]}
        state.summary = averages | {"loss_median": statistics.median(row["loss"] for row in state.rows)}

    def after_epoch(self, state: TrainState) -> None:
        state.rows = []

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
        rate = count * self.batch_size / (time.monotonic() - self.since)
        lr = state.optimizer.param_groups[0]["lr"]
        if dist.rank() == 0:
            self.writer.write("train", epoch=state.epoch, step=state.step, lr=lr, images_per_s=rate, **averages)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in averages.items())
        log.info(f"epoch {state.epoch}  step {state.step}  {shown}  lr {lr:.2g}  {rate:.1f} images/s")
        self.since = time.monotonic()


SAVE, STOP = 1, dist.STOP  # wishes, the greater one wins


class SaveCheckpoints(Hook):
    """Saves after each epoch, every so many steps or minutes, and when a signal asks for the end.

    Rank 0 saves `payload(state)` while the others wait. Stands last, and knows the hook that checks the numbers.

    Raises: Stopped on every rank after the same step, once that is saved.
    """

    def __init__(
        self,
        run_dir: RunDir,
        payload: Callable[[TrainState], dict[str, Any]],
        when: Checkpoint,
        metrics: LogMetrics,
    ) -> None:
        self.run_dir, self.payload, self.when, self.metrics = run_dir, payload, when, metrics
        self.wishes, self.saved_at, self.asked = dist.Wishes(), time.monotonic(), False
        self.just_saved = False

    def after_step(self, state: TrainState, numbers: dict[str, torch.Tensor]) -> None:
        wish = self.wishes.exchange(self._wish())
        if wish == SAVE and self.just_saved and dist.size() > 1:
            wish = 0  # wished for a step ago, before that save
        self.just_saved = False
        if wish or (self.when.every_steps and state.step % self.when.every_steps == 0):
            self.now(state)
        if wish == STOP:
            raise Stopped(
                f"stopped by {stop.told()} after step {state.step}, which is saved; the same again goes on there"
            )

    def after_epoch(self, state: TrainState) -> None:
        self.now(state)

    def _wish(self) -> int:
        if stop.requested():
            return STOP
        minutes = (time.monotonic() - self.saved_at) / 60
        # once, by one clock: the answer comes a step later, and must not be followed by another
        if dist.rank() or self.asked or not self.when.every_minutes or minutes < self.when.every_minutes:
            return 0
        self.asked = True
        return SAVE

    def now(self, state: TrainState) -> None:
        """Save, all ranks together. Raises: DivergedError, EnvironmentProblem."""
        self.metrics.fetch(state)
        self.metrics.check_weights(state)
        began = time.monotonic()
        path = checkpoint.save(self.run_dir, self.payload(state)) if dist.rank() == 0 else None
        upload.push(self.run_dir)
        if path:
            seconds, between = time.monotonic() - began, began - self.saved_at
            log.info(f"{path.name} saved in {seconds:.2f} s")
            if seconds > LONG_SAVE * between and between > 60:
                log.warning(f"that is {seconds / between:.0%} of the time since the one before: save less often?")
        self.saved_at, self.asked, self.just_saved = time.monotonic(), False, True


def standard(
    run_dir: RunDir,
    state: TrainState,
    cfg: Training,
    payload: Callable[[TrainState], dict[str, Any]],
    files: Callable[[int, int], Sequence[str]],
) -> tuple[LogMetrics, SaveCheckpoints]:
    """The two hooks for a run at `state`; what stands between them runs between them."""
    # the last line that was written until there: an epoch's lines stand at multiples of log_every
    writer = MetricsWriter(run_dir.metrics, epoch=state.epoch, step=state.step - state.batch % cfg.log_every)
    metrics = LogMetrics(writer, every=cfg.log_every, batch_size=cfg.batch_size, files=files)
    return metrics, SaveCheckpoints(run_dir, payload, cfg.checkpoint, metrics)
