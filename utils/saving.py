"""The hook that saves checkpoints, and the two hooks that every program uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from utils import checkpoint, dist, log, stop, timeline, upload
from utils.errors import Stopped
from utils.hooks import Hook, LogMetrics
from utils.metrics import MetricsWriter
from utils.paths import RunDir
from utils.shared_config import Checkpoint, Training

if TYPE_CHECKING:
    from utils.engine import TrainState

LONG_SAVE = 0.1  # share of the time between two saves
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
        timeline.done("compute")
        path = checkpoint.save(self.run_dir, self.payload(state)) if dist.rank() == 0 else None
        timeline.saved()
        upload.push(self.run_dir)
        if path:
            seconds, between = time.monotonic() - began, began - self.saved_at
            log.info(f"{path.name} saved in {seconds:.2f} s")
            if seconds > LONG_SAVE * between and between > 60:
                log.warning(f"that is {seconds / between:.0%} of the time since the one before: save less often?")
        self.saved_at, self.asked, self.just_saved = time.monotonic(), False, True
        timeline.done("saving")


def standard(
    run_dir: RunDir,
    state: TrainState,
    cfg: Training,
    payload: Callable[[TrainState], dict[str, Any]],
    files: Callable[[int, int], Sequence[str]],
) -> tuple[LogMetrics, SaveCheckpoints]:
    """The two hooks for a run at `state`; what stands between them runs between them."""
    # the last line that was written until there: an epoch's lines stand at multiples of log_every
    writer = MetricsWriter(run_dir, epoch=state.epoch, step=state.step - state.batch % cfg.log_every)
    metrics = LogMetrics(writer, every=cfg.log_every, batch_size=cfg.batch_size, files=files)
    return metrics, SaveCheckpoints(run_dir, payload, cfg.checkpoint, metrics)
