"""Whether XLA has settled: a step that is traced to another graph than before is compiled, which takes minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from utils import device, log
from utils.errors import RelayError
from utils.hooks import Hook

if TYPE_CHECKING:
    from utils.engine import TrainState

MOST = 8  # steps that may compile: the first two always do, and one or two after a change of what is trained


class WatchCompiles(Hook):
    """Logs the count of compiled graphs when it has changed. Raises: RelayError when it keeps growing."""

    def __init__(self) -> None:
        self.count = device.compiles()
        self.compiled: list[int] = []  # the steps that did

    def before_epoch(self, state: TrainState) -> None:
        self.count = device.compiles()  # validation and saving may have theirs

    def after_step(self, state: TrainState, numbers: dict[str, torch.Tensor]) -> None:
        count = device.compiles()
        if count > self.count:
            log.info(f"step {state.step}: XLA has compiled {count} graphs")
            self.compiled.append(state.step)
        self.count = count
        if len(self.compiled) > MOST:
            raise RelayError(
                f"XLA does not settle, it has compiled in steps {', '.join(map(str, self.compiled))}: "
                "a shape, or a Python number that becomes part of the graph, changes with the data"
            )
