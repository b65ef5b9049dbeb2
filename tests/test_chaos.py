"""The quick form of `make chaos`: a handful of faults on pretraining alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import __main__ as chaos
from tests.chaos import report
from tests.chaos.driver import Injected, plan
from tests.chaos.faults import FAULTS
from tests.chaos.place import Place
from tests.chaos.record import Line
from tests.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("nothing_stays_queued")]
KINDS = ["rank killed", "second attempt", "disk full", "checkpoint bit flipped"]


@pytest.fixture
def place(tmp_path: Path, cluster_without_accounting: Cluster) -> Iterator[Place]:
    place = Place(tmp_path, cluster_without_accounting, ["pretrain"], ["epochs=2"])
    yield place
    if place.disk:
        place.disk.remove()


def test_faults_of_a_seed_are_survived_and_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    good = chaos.chaos(place, seed=5, count=len(KINDS), names=KINDS)
    said = capsys.readouterr().out
    assert good, said
    names = KINDS if place.disk else [name for name in KINDS if not FAULTS[name].needs_disk]
    for name in names:
        assert f"\n{name}  " in said
    assert f"{len(KINDS)} faults of {len(names)} kinds, {len(KINDS)} survived" in said
    assert "0 temporary files and 0 processes left over; seed 5" in said


def test_the_plan_follows_from_the_seed() -> None:
    order = [("pretrain", step) for step in range(1, 31)] + [("r1", step) for step in range(1, 31)]

    def made(seed: int) -> list[Injected]:
        return plan(list(FAULTS), 40, [*order, ("eval", 0)], random.Random(seed))

    assert made(3) == made(3) != made(4)
    assert {fault.name for fault in made(3)} == set(FAULTS)
    where = [order.index(fault.where) for fault in made(3)[:-1]]
    assert where == sorted(where)
    assert FAULTS[made(3)[-1].name].anywhere


def test_one_other_digest_is_told() -> None:
    fault = Injected("rank killed", ("r1", 2), injected=True, survived=True)
    fault.lines = [Line("r1", "7_001", step, {"step": step, "digest": f"{step}"}) for step in (1, 2)]
    reference = {("r1", line.step): dict(line.content) for line in fault.lines}
    assert report.rows([fault], reference)[0][-1] == "yes"
    fault.lines[1].content["digest"] = "another"
    assert report.rows([fault], reference)[0][-1] == "NO"
