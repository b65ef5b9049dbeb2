"""What each attempt at a stage has trained: a file of steps an attempt, which the driver reads while it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.faults import recorder
from utils import engine, env, hooks
from utils.paths import ROOT

FOLDER = "record"  # in the checkout, not in runs/: that disk is filled

PACE = 0.3  # seconds that a step takes at least: a fault needs some to find its moment

Main = Callable[[Sequence[str] | None], dict[str, Any]]


class Line(NamedTuple):
    """A step that an attempt has finished. `content` is the same in every run of it."""

    stage: str
    attempt: str
    step: int
    content: dict[str, Any]


def recorded(main: Main, parse: Callable[[Sequence[str] | None], Any]) -> Main:
    """`main` of a training program, which writes down its steps."""

    def wrapped(argv: Sequence[str] | None = None) -> dict[str, Any]:
        run_dir = Path(parse(argv).run_dir)
        folder = ROOT / FOLDER / run_dir.parent.name / run_dir.name
        folder.mkdir(parents=True, exist_ok=True)
        recorder.record_steps(folder / f"{env.job_id()}_{env.restarts():03d}.jsonl", None)
        _slow_down()
        return main(argv)

    return wrapped


def _slow_down() -> None:
    after_step = hooks.LogMetrics.after_step

    def slowed(self: hooks.LogMetrics, state: engine.TrainState, numbers: dict[str, torch.Tensor]) -> None:
        time.sleep(PACE)
        after_step(self, state, numbers)

    hooks.LogMetrics.after_step = slowed  # type: ignore[method-assign]


def lines(root: Path, chain: str) -> Iterator[Line]:
    """All steps of a chain in the checkout `root`; those of one attempt in their order."""
    for file in sorted((root / FOLDER / chain).glob("*/*.jsonl")):
        for content in recorder.read(file):
            yield Line(file.parent.name, file.stem, content["step"], content)
