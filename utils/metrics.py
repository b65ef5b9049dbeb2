"""Metrics: one JSON object a line. Console lines, reports and plots are renderings of it.

Kinds: "train" every `log_every` steps, with the rates of `Since`, `steps`, the stage's last one, and `left_s`, the
seconds until then (null when it is not known yet); "epoch" when an epoch's training ends, with its averages and its
`seconds`; "val" when it was validated. An epoch that was interrupted has the rates and seconds of its last attempt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils import timeline
from utils.errors import InputError
from utils.files import write_text

TIMES = ("images_per_s", "data_wait", "left_s", "seconds")  # in no two runs the same


class MetricsWriter:
    """Appends records to a JSON-lines file. Its first write drops what a resumed run will write again.

    Made on every rank, written to by rank 0 only: nothing touches the file before the first write.
    """

    def __init__(self, path: Path, *, epoch: int, step: int) -> None:
        """Records of epochs before `epoch`, and of its training up to `step`, are kept; a torn last line is not."""
        self.path, self.epoch, self.step, self.started = path, epoch, step, False

    def _is_kept(self, record: dict[str, Any]) -> bool:
        if record["kind"] == "train":
            return record["step"] <= self.step
        return record["epoch"] < self.epoch

    def write(self, kind: str, *, epoch: int, step: int, **values: Any) -> None:
        """Append one record: `kind`, counters and plain values."""
        if not self.started:
            kept = filter(self._is_kept, list(read(self.path)))
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self.started = True
        with open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **values}) + "\n")


class Since(NamedTuple):
    """A moment of a run, from which rates count."""

    at: float
    waited: float  # seconds for data, until then
    step: int

    @classmethod
    def now(cls, step: int) -> Since:
        return cls(timeline.clock(), timeline.spent("data wait"), step)

    def rates(self, step: int, batch_size: int) -> dict[str, float]:
        """`images_per_s`, and `data_wait`: the share of the time in which there was nothing to compute on, 0 to 1."""
        seconds = timeline.clock() - self.at
        waited = timeline.spent("data wait") - self.waited
        return {"images_per_s": (step - self.step) * batch_size / seconds, "data_wait": waited / seconds}

    def left(self, step: int, last: int) -> float | None:
        """Seconds until step `last` if all goes on as it went since; None when there was no step yet."""
        return (timeline.clock() - self.at) / (step - self.step) * (last - step) if step > self.step else None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, none if there is no file; a last line torn by a kill is left out."""
    if not path.exists():
        return
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def newest(path: Path) -> dict[str, Any]:
    """The newest value of everything in a metrics file: its last record of each kind, the later over the earlier.

    Other lines are not parsed: status asks this of many long files. Raises: InputError when one of them is damaged.
    """
    last: dict[str, str] = {}
    try:
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            for line in file:
                if line.endswith("\n"):
                    kind = line[: line.find(",")]  # `{"kind": "train"`
                    last.pop(kind, None)
                    last[kind] = line
        return {key: value for line in last.values() for key, value in json.loads(line).items()}
    except (ValueError, AttributeError):
        raise InputError(f"{path}: a line is damaged") from None
