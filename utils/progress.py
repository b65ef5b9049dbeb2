"""How far a long piece of work is: a bar on a terminal, one plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time

LOG_SECONDS = 5.0
BAR_SECONDS = 0.1
BAR_WIDTH = 30


class Progress:
    """Reports on stderr; a context manager.

        with Progress("unpack labeled.sqsh", total=size, unit="B") as progress:
            progress.update(len(chunk))

    `total` and `update` count in `unit`; bytes ("B") are shown as MiB.
    """

    def __init__(self, what: str, total: int, unit: str = "") -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._bar = sys.stderr.isatty()
        self._start = self._last = time.monotonic()

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
            self._show(end="" if self._bar else "\n")

    def close(self) -> None:
        """The last line: how far it came and how long it took."""
        self._show(end="\n")

    def _show(self, end: str) -> None:
        seconds = time.monotonic() - self._start
        part = min(1.0, self.done / self.total) if self.total else 1.0
        line = f"{part:4.0%} {self._amounts()} {seconds:.0f} s"
        if 0 < part < 1:
            line += f", {seconds / part - seconds:.0f} s left"
        if self._bar:
            filled = round(part * BAR_WIDTH)
            line = f"\r\033[K{self.what} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {line}"
        else:
            line = f"{self.what}: {line.strip()}"
        print(line, end=end, file=sys.stderr, flush=True)

    def _amounts(self) -> str:
        if self.unit == "B":
            return f"{self.done / 2**20:.1f}/{self.total / 2**20:.1f} MiB"
        return f"{self.done}/{self.total} {self.unit}".rstrip()
