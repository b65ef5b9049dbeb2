"""A run that is killed and goes on is the run that was never killed: every loss, every bit of model and optimizer."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.faults import recorder
from tests.labeled_set import write_set
from tests.test_detect_train import SMALL as SMALL_DETECTOR
from tests.test_events import picture_steps
from tests.test_ssl_train import SMALL as SMALL_MOCO
from tests.test_ssl_train import write_images
from utils import goodput, metrics
from utils.paths import RunDir


@dataclass
class Program:
    """A training program with its words, run by `ranks` processes that write down every step."""

    folder: Path
    words: list[str]
    ranks: int

    def start(self, name: str, *words: object) -> subprocess.CompletedProcess[str]:
        """Run in the folder `name`, on from whatever is there."""
        module, *own = self.words
        command = ["-m", "tests.faults.recorder", self.folder / f"{name}.jsonl", *words, module, *own]
        command += ["--run-dir", self.folder / name]
        if self.ranks > 1:
            return ranks.torchrun(self.ranks, *command)
        return ranks.run([sys.executable, *command])

    def whole(self) -> dict[int, dict[str, Any]]:
        """Step -> its line, of a run that nothing disturbs."""
        done = self.start("whole")
        assert done.returncode == 0, done.stderr[-3000:]
        return {line["step"]: line for line in self.lines("whole")}

    def lines(self, name: str) -> list[dict[str, Any]]:
        return recorder.read(self.folder / f"{name}.jsonl")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl without the rates."""
        lines = metrics.read(self.folder / name / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in metrics.TIMES} for line in lines]


def killed(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == -signal.SIGKILL or "SIGKILL" in done.stderr


def check_same(whole: dict[int, dict[str, Any]], lines: list[dict[str, Any]], steps: list[int]) -> None:
    """`lines` are of `steps`, in that order, each as in the whole run."""
    assert [line["step"] for line in lines] == steps
    check_steps(whole, lines)


def check_steps(whole: dict[int, dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Each line is as in the whole run, all of whose steps are there, and it is no equality of NaN."""
    assert [line for line in lines if line != whole[line["step"]]] == []
    assert all(line["finite"] for line in whole.values())
    assert len({line["digest"] for line in whole.values()}) == len(whole)


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("pretraining")
    words = ["--dataset-root", str(write_images(folder / "images", 28)), *SMALL_MOCO]  # 7 steps an epoch
    own = [
        "epochs=2",
        "workers=2",
        "model.bn_groups=2",
        "precision=bf16",
        "deterministic=true",
        "checkpoint.every_steps=2",
        "log_every=3",
    ]
    return Program(folder, ["ssl_train.train", *words, *own], ranks=1)


def test_pretraining_killed_twice_in_an_epoch(pretraining: Program) -> None:
    whole = pretraining.whole()
    for step in (3, 5):
        assert killed(pretraining.start("cut", "--kill", step))
    assert pretraining.start("cut").returncode == 0
    check_same(whole, pretraining.lines("cut"), [1, 2, 3, 3, 4, 5, *range(5, 15)])
    assert pretraining.metrics("cut") == pretraining.metrics("whole")
    assert picture_steps(pretraining.folder / "cut", "views") == [1, 8]
    spent = goodput.stage(RunDir(pretraining.folder / "cut"), None)
    assert (spent.restarts, spent.problems) == (2, ())
    backbones = [(pretraining.folder / name / "backbone.pth").read_bytes() for name in ("whole", "cut")]
    assert backbones[0] == backbones[1]


@pytest.fixture(scope="module")
def round_of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, dict[int, dict[str, Any]]]:
    """A round killed before its first checkpoint and after its second step, and the whole one's steps."""
    folder = tmp_path_factory.mktemp("round")
    words = ["--dataset-root", str(write_set(folder / "data", training=20)), *SMALL_DETECTOR]  # 5 steps an epoch
    own = ["--lr", "0.01", "epochs=2", "workers=1", "checkpoint.every_steps=2", "log_every=3"]
    program = Program(folder, ["detect_train.train", *words, *own], ranks=2)
    whole = program.whole()
    for step in (1, 3):
        assert killed(program.start("cut", "--kill", step))
    return program, whole


def test_a_round_of_two_ranks_killed_before_its_first_checkpoint_and_later(
    round_of_two_ranks: tuple[Program, dict[int, dict[str, Any]]],
) -> None:
    program, whole = round_of_two_ranks
    shutil.copytree(program.folder / "cut", program.folder / "on")
    assert program.start("on").returncode == 0
    check_same(whole, program.lines("cut"), [1, 1, 2, 3])
    check_same(whole, program.lines("on"), [3, 4, 5, 6, 7, 8, 9, 10])
    assert program.metrics("on") == program.metrics("whole")


@pytest.mark.parametrize("broken", recorder.BREAKS)
def test_the_comparison_notices_a_rule_that_is_broken(
    round_of_two_ranks: tuple[Program, dict[int, dict[str, Any]]], broken: str
) -> None:
    program, whole = round_of_two_ranks
    shutil.copytree(program.folder / "cut", program.folder / broken)
    program.start(broken, "--break", broken, "--kill", 4)
    with pytest.raises(AssertionError):
        check_same(whole, program.lines(broken), [3, 4])
    assert [line["step"] for line in program.lines(broken)] == [3, 4], "it ran, and was different"
