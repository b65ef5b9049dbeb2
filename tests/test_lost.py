"""Processes of a run that are killed or stopped: it ends soon, says why, and goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import recorder
from tests.ranks import environment
from tests.test_dist import step
from tests.test_ssl_train import SMALL, write_images
from utils import loader
from utils.paths import ROOT

TIMEOUT = 6  # seconds without an answer


class TwoRanks:
    """Pretraining by two processes with a loader worker each, as in a Slurm step: nobody ends one for the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record, self.job = folder, folder / "steps.jsonl", 50
        words = [
            "--dataset-root",
            write_images(folder / "images", 28),
            "epochs=1000",
            "workers=1",
            *SMALL[:5],
            *SMALL[6:],
        ]
        self.words = [*words, "checkpoint.every_steps=3", "log_every=1", f"collective_timeout={TIMEOUT}"]

    def start(self) -> list[subprocess.Popen[str]]:
        self.job += 1
        command = [sys.executable, "-m", "tests.faults.recorder", self.record, "ssl_train.train"]
        command += ["--run-dir", self.folder / "run", *self.words]
        return [
            subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment(step(rank, 2, str(self.job))),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]

    def lines(self) -> list[dict[str, Any]]:
        return recorder.read(self.record) if self.record.exists() else []


def worker_of(process: subprocess.Popen[str]) -> int:
    """The loader worker of a rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if "recorder" in Path(f"/proc/{pid}/cmdline").read_text())


SILENT = f"a loader process gave nothing for {int(loader.WAIT * TIMEOUT)} s"
LOST = "ERROR 75: lost another rank, which ended or did not answer in time"
FAULTS: list[tuple[str, Callable[[subprocess.Popen[str]], int], signal.Signals, str]] = [
    ("a killed rank", lambda process: process.pid, signal.SIGKILL, LOST),
    ("a stopped rank", lambda process: process.pid, signal.SIGSTOP, LOST),
    ("a killed worker", worker_of, signal.SIGKILL, "was killed (Killed), perhaps for memory"),
    (
        "a stopped worker",
        worker_of,
        signal.SIGSTOP,
        SILENT,
    ),
]


def test_ranks_and_workers_that_are_lost(tmp_path: Path) -> None:
    two = TwoRanks(tmp_path)
    for what, victim, fault, message in FAULTS:
        before = len(two.lines())
        ranks = two.start()
        while len(two.lines()) < before + 5:
            assert [process.poll() for process in ranks] == [None, None], what
            time.sleep(0.02)
        os.kill(victim(ranks[1]), fault)
        _, said = ranks[0].communicate(timeout=TIMEOUT + 30)
        assert ranks[0].returncode == 75, (what, said)
        if victim is worker_of:
            _, said = ranks[1].communicate(timeout=TIMEOUT + 30)
            assert ranks[1].returncode == 75, (what, said)
        ranks[1].kill()  # a stopped one is still there
        ranks[1].wait()
        assert message in said, (what, said)
    lines = two.lines()
    steps: dict[int, set[str]] = {}
    for line in lines:
        steps.setdefault(line["step"], set()).add(line["digest"])
    assert list(steps) == list(range(1, len(steps) + 1)) and len(lines) > len(steps), "some were done again"
    assert {len(digests) for digests in steps.values()} == {1}, "and each time alike"
