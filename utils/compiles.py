"""Whether XLA has settled: a step that is traced to another graph than before is compiled, which takes minutes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from utils import device, log
from utils.errors import RelayError
from utils.hooks import Hook

if TYPE_CHECKING:
    from utils.engine import TrainState

RECENT = 10  # steps that are looked at
MOST = 6  # of them may compile: the first two always do, and those after a change of what is trained


class WatchCompiles(Hook):
    """Logs the count of compiled graphs when it has changed. Raises: RelayError when it keeps growing."""

    def __init__(self) -> None:
        self.count = device.compiles()
        self.grew: deque[bool] = deque(maxlen=RECENT)

    def before_epoch(self, state: TrainState) -> None:
        self.count = device.compiles()  # validation and saving may have theirs

    def after_step(self, state: TrainState, numbers: dict[str, torch.Tensor]) -> None:
        count = device.compiles()
        self.grew.append(count > self.count)
        if count > self.count:
            log.info(f"step {state.step}: XLA has compiled {count} graphs")
        self.count = count
        if sum(self.grew) > MOST:
            raise RelayError(
                f"XLA compiles in nearly every step, {sum(self.grew)} of the last {len(self.grew)} up to {state.step}: "
                "a shape, or a Python number that becomes part of the graph, changes with the data"
            )
