"""How far a long piece of work is: a bar on a terminal, one plain line every few seconds in a log.

Bars are drawn from the thread that does the work: loader processes forked meanwhile inherit no lock that another holds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from utils import log

LOG_SECONDS = 5.0
LINE_SECONDS = 10.0  # of training
BAR_SECONDS = 0.1


class Progress:
    """Reports on stderr; a context manager.

        with Progress("unpack labeled.sqsh", total=size, unit="B") as progress:
            progress.update(len(chunk))

    `total` and `update` count in `unit`; bytes ("B") are shown as MiB.
    """

    def __init__(self, what: str, total: int, unit: str = "") -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._bar = _Bar("stderr", total, what) if sys.stderr.isatty() else None
        self._start = self._last = time.monotonic()
        if self._bar:
            self._bar.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, count: int) -> None:
        """Add `count` to what is done."""
        self.done += count
        now = time.monotonic()
        if now - self._last >= (BAR_SECONDS if self._bar else LOG_SECONDS):
            self._last = now
            self._show()

    def close(self) -> None:
        """The last line: how far it came and how long it took."""
        self._show()
        if self._bar:
            self._bar.stop()

    def _show(self) -> None:
        seconds = time.monotonic() - self._start
        part = min(1.0, self.done / self.total) if self.total else 1.0
        state = f"{part:4.0%} {self._amounts()} {seconds:.0f} s"
        if 0 < part < 1:
            state += f", {seconds / part - seconds:.0f} s left"
        if self._bar:
            self._bar.show(self.done, after=state)
        else:
            print(f"{self.what}: {state.strip()}", file=sys.stderr, flush=True)

    def _amounts(self) -> str:
        if self.unit == "B":
            return f"{self.done / 2**20:.1f}/{self.total / 2**20:.1f} MiB"
        return f"{self.done}/{self.total} {self.unit}".rstrip()


class Training:
    """A stage's way to its last step: a bar on a terminal's last line, under what is printed; lines elsewhere.

    Of these the rank's own log gets each, standard output each epoch's last and, without a bar, few others.
    A context manager. Args: epochs, last_step: of the whole stage; is_shown: on standard output.
    """

    def __init__(self, stage: str, epochs: int, last_step: int, *, is_shown: bool) -> None:
        self.stage, self.epochs, self.last_step = stage, epochs, last_step
        self._bar = _Bar("stdout", last_step, stage) if is_shown and sys.stdout.isatty() else None
        self._last, self._numbers = -math.inf, ""

    def __enter__(self) -> Training:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, epoch: int, step: int) -> None:
        """`step` steps are done, in the epoch with that number, from 0."""
        now = time.monotonic()
        if self._bar and now - self._last >= BAR_SECONDS:
            self._last = now
            self._draw(self._bar, epoch, step)

    def numbers(
        self,
        epoch: int,
        step: int,
        losses: Mapping[str, float],
        lr: float,
        rates: Mapping[str, Any],
        *,
        is_last: bool,
    ) -> None:
        """The newest numbers. Args: rates: of a "train" record; is_last: of the epoch."""
        speed = f"{rates['images_per_s']:.1f} images/s  data wait {rates['data_wait']:.0%}"
        left = _left(rates["left_s"])
        parts = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        line = f"epoch {epoch}  step {step}/{self.last_step}  {parts}  lr {lr:.2g}  {speed}  {left}"
        now = time.monotonic()
        if is_last or (not self._bar and now - self._last >= LINE_SECONDS):
            self._last = now
            log.info(line)
        else:
            log.detail(line)
        self._numbers = f"  {left}  loss {losses['loss']:.4f}  {speed}"
        if self._bar:
            self._draw(self._bar, epoch, step)

    def _draw(self, bar: _Bar, epoch: int, step: int) -> None:
        where = f"{self.stage}  epoch {epoch + 1}/{self.epochs}  step {step}/{self.last_step}"
        bar.show(step, before=where + self._numbers)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "? left"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} left"


class _Bar:
    """A line of rich's on standard output or error: a bar between two texts, which take their room first."""

    def __init__(self, on: str, total: int, before: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        def text(field: str) -> TextColumn:
            column = Column(no_wrap=True, overflow="ellipsis")
            return TextColumn(f"{{task.fields[{field}]}}", markup=False, table_column=column)

        console = Console(stderr=on == "stderr", soft_wrap=True)  # what is printed above is not broken into lines
        shown = text("before"), BarColumn(bar_width=None), text("after")
        self.progress = Progress(*shown, console=console, auto_refresh=False, expand=True)
        self.task = self.progress.add_task("", total=total, before=before, after="")
        self.start, self.stop = self.progress.start, self.progress.stop

    def show(self, done: int, **texts: str) -> None:
        self.progress.update(self.task, completed=done, **texts)  # type: ignore[arg-type]
        self.progress.refresh()
