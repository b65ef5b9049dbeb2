"""What a stage's wall time went to: parts over all attempts, what does not add up, what to change."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from utils import goodput
from utils.goodput import Spent
from utils.paths import RunDir

BEGAN = 1_800_000_000.0
TRAINING: dict[str, Any] = {
    "workers": 2,
    "data": {"labeled": "data/labeled.sqsh", "stage": "unpack"},
    "checkpoint": {"every_steps": 0, "every_minutes": 30.0},
}


def attempt(run_dir: RunDir, began: float, seconds: Mapping[str, float], **other: Any) -> Path:
    """Write the file of an attempt that began `began` seconds after the first moment."""
    content: dict[str, Any] = {
        "job": "7", "restarts": 0, "world_size": 4, "device": "NVIDIA H100", "cores": 8, "began": BEGAN + began,
        "at": BEGAN + began + sum(seconds.values()), "seconds": seconds, "unsaved": {}, "ended": True,
    }  # fmt: skip
    run_dir.times.mkdir(parents=True, exist_ok=True)
    file = run_dir.attempt("7", len(list(run_dir.times.iterdir())), BEGAN + began)
    file.write_text(json.dumps(content | other))
    return file


def test_parts_of_all_attempts_add_up_to_the_wall_time(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    attempt(run_dir, 130, {"start-up": 8, "data wait": 10, "compute": 20}, world_size=2)  # written in no order
    lost = {"compute": 25, "data wait": 5}
    attempt(run_dir, 0, {"start-up": 10, "data wait": 20, "compute": 60}, unsaved=lost, ended=False)
    spent = goodput.stage(run_dir, BEGAN - 300)
    assert spent.seconds == {
        "queue": 300, "start-up": 18, "data wait": 25, "compute": 55, "redone": 30, "between attempts": 40
    }  # fmt: skip
    assert sum(spent.seconds.values()) == spent.wall == 468
    assert (spent.restarts, spent.world_size, spent.device, spent.cores, spent.problems) == (
        1, 2, "NVIDIA H100", 8, ()
    )  # fmt: skip
    assert goodput.stage(run_dir, None).wall == 168


def test_what_the_last_attempt_has_not_saved_is_not_done_again(tmp_path: Path) -> None:
    attempt(RunDir(tmp_path), 0, {"compute": 60}, unsaved={"compute": 60})
    assert goodput.stage(RunDir(tmp_path), None).seconds == {"compute": 60}


def test_a_sum_that_is_not_the_wall_time_is_told(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    parts = {"start-up": 10.0, "compute": 1990.0}
    attempt(run_dir, 0, parts, at=BEGAN + 2002.9)  # 1 s and 0.1 % more
    assert not goodput.stage(run_dir, None).problems
    damaged = attempt(run_dir, 5000, parts, at=BEGAN + 5000 + 2003.1)
    (problem,) = goodput.stage(run_dir, None).problems
    assert problem == f"{damaged}: its parts are -3.1 s from its wall time of 2003.1 s"
    attempt(run_dir, 9000, parts, at=BEGAN + 9000 + 1990)
    assert "+10.0 s" in goodput.stage(run_dir, None).problems[1]


@pytest.mark.parametrize(
    ("sound", "damaged"),
    [(".*", ""), (".*", "{}"), (".*", "[]"), ("compute", "coffee"), ('"compute": 60', '"compute": NaN')],
)
def test_a_damaged_file_is_left_out_and_told(tmp_path: Path, sound: str, damaged: str) -> None:
    run_dir = RunDir(tmp_path)
    attempt(run_dir, 0, {"compute": 60})
    file = attempt(run_dir, 100, {"compute": 60})
    file.write_text(re.sub(sound, damaged, file.read_text(), count=1, flags=re.DOTALL))
    spent = goodput.stage(run_dir, None)
    assert (spent.wall, spent.restarts) == (60, 0)
    (problem,) = spent.problems
    assert problem.startswith(f"{file}: damaged, left out: ")


def test_a_stage_submitted_again_waits_in_the_queue_for_its_second_attempt(tmp_path: Path) -> None:
    """Failed after a minute, submitted again after 1,000 s, begun after 1,100."""
    run_dir = RunDir(tmp_path)
    attempt(run_dir, 0, {"compute": 60}, unsaved={"compute": 10})
    attempt(run_dir, 1100, {"compute": 50})
    attempt(run_dir, 1200, {"compute": 30}, world_size=8)  # requeued
    spent = goodput.stage(run_dir, BEGAN + 1000)
    assert spent.seconds == {"queue": 100, "compute": 130, "redone": 10, "between attempts": 940 + 50}
    assert sum(spent.seconds.values()) == spent.wall == 1230 and not spent.problems
    assert spent.rank_seconds == 4 * 110 + 8 * 30
    assert goodput.stage(run_dir, BEGAN + 40).seconds["queue"] == 1100 - 60, "submitted while the first one ran"
    waiting = goodput.stage(run_dir, BEGAN + 5000)
    assert waiting.seconds == {"compute": 130, "redone": 10, "between attempts": 1040 + 50} and not waiting.problems


def test_attempts_at_once_and_more_lost_than_there_was_are_told(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    first = attempt(run_dir, 0, {"compute": 60})
    second = attempt(run_dir, 50, {"compute": 60}, unsaved={"validation": 5})
    unsaved, twice = goodput.stage(run_dir, BEGAN - 20).problems
    assert twice == f"{second}: begun before {first.name} ended, by 10.0 s"
    assert unsaved == f"{second}: more validation is unsaved than there was"


def test_a_stage_without_times_says_so(tmp_path: Path) -> None:
    spent = goodput.stage(RunDir(tmp_path), None)
    assert spent == Spent(problems=(f"{tmp_path / 'times'}: no times were kept",))
    assert goodput.advice(spent, TRAINING) == "nothing above 10 %"


def of(part: str, percent: float, **known: Any) -> Spent:
    rest = (100 - percent) / 2
    return Spent(
        {part: percent, "compute": rest, "evaluation": rest}, 100, 0, 4, "NVIDIA H100", **({"cores": 8} | known)
    )


PRETRAINING = TRAINING | {"data": {"unlabeled": "images", "stage": "direct", "cache": None}}
EVALUATION = TRAINING | {"checkpoint": "best.pth"}


@pytest.mark.parametrize(
    "spent, config, said",
    [
        (of("data wait", 38), TRAINING, "38 % waiting for data: raise workers from 2 to 7"),
        (
            of("data wait", 38), PRETRAINING,
            "38 % waiting for data: raise workers from 2 to 7, or pack images into an archive, or set data.cache",
        ),
        (of("data wait", 38, cores=3), TRAINING, "38 % waiting for data: ask for more cores than 3 a rank"),
        (of("staging", 20), TRAINING, "20 % staging data: set data.stage=direct instead of unpack"),
        (of("staging", 20), PRETRAINING, "20 % staging data: keep the data on a disk that outlives the job"),
        (of("queue", 90), TRAINING, "90 % in the queue: a shorter --time in the stage's #SBATCH header"),
        (of("redone", 11), TRAINING, "11 % done again after restarts: lower checkpoint.every_minutes from 30"),
        (of("redone", 11), EVALUATION, "11 % done again after restarts: an evaluation cannot go on within"),
        (of("saving", 30), TRAINING, "30 % saving: raise checkpoint.every_minutes from 30"),
        (of("saving", 30), EVALUATION, "30 % saving: what is saved once an epoch and at the end is too slow"),
        (of("validation", 30), TRAINING, "30 % validating: more ranks than 4 share it"),
        (
            of("validation", 30), TRAINING | {"validate_every": 3},
            "30 % validating: more ranks than 4 share it, or raise validate_every from 3",
        ),
        (of("start-up", 12), TRAINING, "12 % starting up: run longer jobs, or fewer stages"),
        (of("labels", 12), TRAINING, "12 % reading labels: stages of one chain share their index"),
        (of("between attempts", 60), TRAINING, "60 % between attempts: a longer --time"),
        (of("data wait", 10), TRAINING, "nothing above 10 %"),
    ],
)  # fmt: skip
def test_the_biggest_loss_is_named_with_what_to_change(spent: Spent, config: dict[str, Any], said: str) -> None:
    assert goodput.advice(spent, config).startswith(said)


def test_every_part_that_can_be_lost_has_a_remedy() -> None:
    assert set(goodput.REMEDIES) == set(goodput.PARTS) - set(goodput.WORK)
