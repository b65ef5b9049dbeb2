"""Metrics: one JSON object a line. Console lines, reports, plots and TensorBoard are renderings of it.

Kinds: "train" every `log_every` steps, with the rates of `Since`, `steps`, the stage's last one, and `left_s`, the
seconds until then (null when it is not known yet); "epoch" when an epoch's training ends, with its averages and its
`seconds`; "val" when it was validated. An epoch that was interrupted has the rates and seconds of its last attempt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from utils import timeline
from utils.errors import InputError
from utils.events import Events
from utils.files import write_text
from utils.paths import RunDir

PLACE = ("kind", "epoch", "step", "steps", "left_s")  # of a record: where its numbers belong, and how far that is
TIMES = ("images_per_s", "data_wait", "left_s", "seconds")  # in no two runs the same


class MetricsWriter:
    """Appends records to a run's metrics.jsonl. Its first write drops what a resumed run will write again.

    Made on every rank, written to by rank 0 only: nothing touches the files before the first write.
    """

    def __init__(self, run_dir: RunDir, *, epoch: int, step: int) -> None:
        """Records of epochs before `epoch`, and of its training up to `step`, are kept; a torn last line is not."""
        self.run_dir, self.epoch, self.step, self.started = run_dir, epoch, step, False

    @cached_property
    def events(self) -> Events:
        """The same records for TensorBoard, and pictures."""
        return Events(self.run_dir.tensorboard, self.step + 1)

    def _is_kept(self, record: dict[str, Any]) -> bool:
        if record["kind"] == "train":
            return record["step"] <= self.step
        return record["epoch"] < self.epoch

    def write(self, kind: str, *, epoch: int, step: int, **values: Any) -> None:
        """Append one record: `kind`, counters and plain values."""
        if not self.started:
            kept = filter(self._is_kept, list(read(self.run_dir.metrics)))
            write_text(self.run_dir.metrics, "".join(json.dumps(record) + "\n" for record in kept))
            self.started = True
        record = {"kind": kind, "epoch": epoch, "step": step, **values}
        with open(self.run_dir.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.events.scalars(kind, numbers(record), step)


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


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What a record measured: its numbers but those of its place."""
    return {
        name: value
        for name, value in record.items()
        if name not in PLACE and isinstance(value, int | float) and not isinstance(value, bool)
    }


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
