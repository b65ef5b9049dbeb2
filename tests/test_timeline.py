"""Where the wall time goes: each moment is counted once, and what is kept outlives what ends a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from utils import env, timeline
from utils.paths import RunDir
from utils.timeline import Timeline

ALONE = env.World(0, 1, 0, 1, "single")
UNIX = 1_800_000_000.0  # at second 0 of the clock


class Clock:
    """Both clocks of the module; they agree."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A process that was started at second 1000."""
    clock = Clock()
    monkeypatch.setattr(timeline, "clock", clock)
    monkeypatch.setattr(time, "time", lambda: UNIX + clock.now)
    monkeypatch.setattr(timeline, "_timeline", Timeline(1000.0))
    monkeypatch.setattr(timeline, "_phases", [("", 1000.0)])
    return clock


@pytest.fixture
def spend(clock: Clock) -> Iterator[Callable[[float, str], None]]:
    def spend(seconds: float, part: str) -> None:
        clock.now += seconds
        timeline.done(part)

    yield spend


def kept(run_dir: RunDir) -> list[dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in run_dir.times.iterdir()]
    return sorted(found, key=lambda times: times["began"])


def test_every_moment_since_the_process_began_belongs_to_one_part(
    tmp_path: Path, clock: Clock, spend: Callable[[float, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    spend(3, "start-up")
    with timeline.kept(RunDir(tmp_path), ALONE, "one of its kind"):
        spend(5, "staging")
        spend(2, "start-up")
        spend(0.5, "data wait")
        spend(1.5, "compute")
        clock.now += 0.25
        timeline.saved()
        spend(4, "data wait")
        spend(1, "compute")
        spend(6, "validation")
    (times,) = kept(RunDir(tmp_path))
    assert times["seconds"] == {
        "start-up": 5, "staging": 5, "data wait": 4.5, "compute": 2.5, "saving": 0.25, "validation": 6
    }  # fmt: skip
    assert times["unsaved"] == {"data wait": 4, "compute": 1, "validation": 6}
    assert (times["began"], times["at"]) == (UNIX + 1000, UNIX + 1023.25)
    assert sum(times["seconds"].values()) == times["at"] - times["began"]
    assert (times["job"], times["restarts"], times["device"], times["ended"]) == ("77", 2, "one of its kind", True)
    assert [file.name for file in tmp_path.glob("times/*")] == [f"77_2_{UNIX + 1000:.2f}.json"]


def test_the_file_is_written_seldom_and_at_each_save(
    tmp_path: Path, clock: Clock, spend: Callable[[float, str], None]
) -> None:
    def steps() -> float:
        (times,) = kept(RunDir(tmp_path))
        assert sum(times["seconds"].values()) == times["at"] - times["began"]
        return times["seconds"].get("compute", 0)

    clock.now += 3  # until the ranks have met
    with timeline.kept(RunDir(tmp_path), ALONE, "cpu"):
        spend(9, "compute")
        assert steps() == 0
        spend(2, "compute")
        assert steps() == 11
        spend(3, "compute")
        assert steps() == 11
        timeline.saved()
        (times,) = kept(RunDir(tmp_path))
        assert (steps(), times["unsaved"], times["ended"]) == (14, {}, False)


@pytest.mark.parametrize(
    "before, cut_short", [("data wait", "compute"), ("compute", "data wait"), ("saving", "saving")]
)
def test_an_error_leaves_the_times_until_then(
    tmp_path: Path, clock: Clock, spend: Callable[[float, str], None], before: str, cut_short: str
) -> None:
    with pytest.raises(KeyboardInterrupt), timeline.kept(RunDir(tmp_path), ALONE, "cpu"):
        spend(1, before)
        clock.now += 7
        raise KeyboardInterrupt
    (times,) = kept(RunDir(tmp_path))
    assert times["ended"] and sum(times["seconds"].values()) == 8
    assert times["seconds"][cut_short] >= 7


def test_each_run_of_a_process_has_its_own_file(
    tmp_path: Path, clock: Clock, spend: Callable[[float, str], None]
) -> None:
    for _ in range(2):
        spend(2, "start-up")
        with timeline.kept(RunDir(tmp_path), ALONE, "cpu"):
            spend(4, "compute")
            clock.now += 1
        assert timeline.spent("compute") == 4
        clock.now += 100  # of no run
    first, second = kept(RunDir(tmp_path))
    assert first["seconds"] == {"start-up": 2, "compute": 4, "data wait": 1}
    assert second["seconds"] == {"start-up": 0, "compute": 4, "data wait": 1}, "it begins with its first part's end"
    assert second["began"] == first["at"] + 102


def test_other_ranks_keep_nothing(tmp_path: Path, clock: Clock) -> None:
    with timeline.kept(RunDir(tmp_path), env.World(1, 2, 1, 2, "torchrun"), "cpu"):
        timeline.saved()
    assert not list(tmp_path.iterdir())


def test_a_rank_s_cores_are_what_slurm_gave_it_or_its_share(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    found = {}
    for world in (env.World(0, 4, 0, 4, "torchrun"), env.World(0, 4, 0, 4, "slurm")):
        with timeline.kept(RunDir(tmp_path / world.launcher), world, "cpu"):
            pass
        found[world.launcher] = kept(RunDir(tmp_path / world.launcher))[0]["cores"]
    assert found == {"torchrun": 3, "slurm": 5}


def test_the_process_s_own_start_is_the_beginning() -> None:
    began = timeline._started()
    ticks = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert 0 <= ticks - began < 24 * 3600
    assert Timeline(began).began == pytest.approx(time.time() - (ticks - began), abs=1)
