"""One chain's table: what its columns say, from which files."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path

import pytest

from jobs import after, page, stages, state, status, store
from jobs.progress import PROGRESS, clock
from jobs.stages import Chain
from jobs.status import COLUMNS
from utils import files, paths
from utils.errors import InputError
from utils.metrics import MetricsWriter
from utils.paths import ROOT


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return stages.load(ROOT / "tests/standin/chain.yaml")


def begin(chain: Chain, stage: str = "r1") -> MetricsWriter:
    """Mark the stage as running in this process; what its program writes metrics with."""
    run_dir = chain.run_dir(stage)
    run_dir.logs.mkdir(parents=True)
    log = run_dir.rank_log("1", 0, 0)
    log.touch()
    state.running(chain, stage, {}, log, {})
    return MetricsWriter(run_dir, epoch=0, step=0)


def row(chain: Chain, stage: str = "r1") -> dict[str, str]:
    """Column -> what the table says, by where the column's name stands."""
    lines = status.table(chain).splitlines()
    line = next(line for line in lines if line.split()[:1] == [stage])
    starts = [lines[1].index(f" {name}") + 1 if at else 0 for at, name in enumerate(COLUMNS)]
    cells = [line[begin:end].strip() for begin, end in zip(starts, [*starts[1:], None], strict=True)]
    return dict(zip(COLUMNS, cells, strict=True))


def seconds(left: str) -> int:
    return sum(int(part) * 60**power for power, part in enumerate(reversed(left.split(":"))))


def test_how_far_a_running_stage_is_and_how_long_it_takes(chain: Chain) -> None:
    writer = begin(chain)
    file = chain.run_dir("r1").metrics
    writer.write("train", epoch=2, step=1100, loss=0.5, images_per_s=10.0, left_s=9000.0, steps=3000)
    writer.write("epoch", epoch=2, step=1150, loss_avg=0.4, seconds=12.0)
    writer.write("val", epoch=2, step=1150, AP=0.125)
    writer.write("train", epoch=3, step=1200, loss=0.25, images_per_s=51.26, left_s=7300.0, steps=3000)
    shown = row(chain)
    assert [shown[name] for name in ("state", "epoch", "step", "images/s", "loss", "AP")] == [
        "RUNNING", "3", "1200/3000", "51.3", "0.2500", "0.1250"
    ]  # fmt: skip
    assert 7200 < seconds(shown["left"]) <= 7300
    began = chain.run_dir("r1").state
    marker = state.marker(chain, "r1") | {"started": "2020-01-01T00:00:00+00:00"}
    files.write_json(began, marker)
    os.utime(file, (time.time() - 3600,) * 2)
    assert 3600 < seconds(row(chain)["left"]) <= 3700, "an hour has passed since the record"
    os.utime(file, (0, 0))
    assert seconds(row(chain)["left"]) == 7300, "the record is of the attempt before"
    state.finish(chain, "r1", InputError("no"), "")
    assert (row(chain)["state"], row(chain)["step"], row(chain)["left"]) == ("FAILED", "1200/3000", "")


def test_each_attempt_counts_whoever_began_it(chain: Chain) -> None:
    begin(chain)
    times = {"started": "2030-01-01T10:00:00+00:00", "ended": "2030-01-01T10:05:00+00:00"}
    state.update(chain, "r1", status="failed", cause="no", **times)
    assert (row(chain)["restarts"], row(chain)["elapsed"]) == ("0", "0:05:00")
    run_dir, now = chain.run_dir("r1"), datetime.datetime.fromisoformat(times["started"]).timestamp()
    spent = {"world_size": 1, "device": "cpu", "cores": 1, "seconds": {}, "unsaved": {}}
    for began, ended in ((now - 5000, now - 4000), (now - 100, now - 80.4), (now - 9, now + 300)):
        files.write_json(run_dir.attempt("1", 0, began), {**spent, "began": began, "at": ended})
    assert (row(chain)["restarts"], row(chain)["elapsed"]) == ("2", "0:22:00"), "1,000 + 20 + 300 s"


def test_records_of_earlier_versions_are_shown_as_far_as_they_go(chain: Chain) -> None:
    begin(chain).write("train", epoch=3, step=1200, loss=0.25)
    shown = row(chain)
    assert [shown[name] for name in PROGRESS] == ["3", "1200", "", "0.2500", "", ""]
    assert [row(chain, "r2")[name] for name in ("state", *PROGRESS)] == ["TODO", *[""] * 6]
    state.done(chain, "r1", {"outputs": {}, "epochs": 4, "metrics": {"AP": 0.5}})
    assert (row(chain)["state"], row(chain)["AP"]) == ("DONE", "0.5000")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (360000, "100:00:00"), (-5, "0:00"),
     (float("nan"), ""), (float("inf"), "")],
)  # fmt: skip
def test_clocks(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_cause_cannot_change_the_terminal_nor_the_table(chain: Chain) -> None:
    begin(chain)
    state.update(chain, "r1", status="failed", cause="\x1b[2Jgone\nr2  DONE\t\u202egnp\x9b1A", host="n\r1\x07")
    table = status.table(chain)
    assert "?[2Jgone r2 DONE ?gnp?1A" in table
    assert all(line.isprintable() for line in table.splitlines())
    assert len(table.splitlines()) == 2 + len(chain.stages)


def test_the_table_is_there_when_the_copies_of_the_store_cannot_be_written(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refresh(chain: Chain) -> None:
        (chain.dir.path / "no" / "folder").touch()

    monkeypatch.setattr(store, "refresh", refresh)
    (note,) = status.refreshed(chain)
    assert note.startswith("as far as this machine knows: FileNotFoundError: ")


def test_a_job_that_is_done_ends_well_whatever_becomes_of_the_page(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_DEATHS", str(tmp_path / "deaths"))
    for stage in chain.stages:
        begin(chain, stage)
        state.done(chain, stage, {"outputs": {}, "epochs": 1, "metrics": {}})

    def printed() -> str:
        with pytest.raises(SystemExit) as ended:
            after.main(["0", *chain.worker_words("r1", [])])
        assert ended.value.code == 0
        return capsys.readouterr().out

    damaged = chain.run_dir("r3").state
    whole = damaged.read_text()
    damaged.write_text("{")
    assert printed().startswith(f"chain page: not written: {damaged} is damaged; ")
    damaged.write_text(whole)
    monkeypatch.setattr(page, "TIMEOUT", 0.02)  # no Python has begun by then
    assert printed() == "chain page: not written: not ready after 0.02 s\n"
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python"))
    assert printed().startswith("chain page: not written: FileNotFoundError: ")


def submit(chain: Chain, **jobs: str) -> None:
    entry = {"token": "", "submitted": "2020-01-02T00:00:00+00:00", "log": "", "config": {}}
    files.write_json(chain.dir.jobs, {stage: {**entry, "job_id": job} for stage, job in jobs.items()})


@pytest.mark.parametrize("squeue", ["is down", None])
def test_a_job_is_not_gone_because_slurm_does_not_answer(chain: Chain, tmp_path: Path, squeue: str | None) -> None:
    begin(chain, "pretrain")
    state.update(chain, "pretrain", slurm=True, job_id="7")
    begin(chain, "r1")
    state.update(chain, "r1", slurm=True, job_id="8", status="failed", cause="no disk")
    submit(chain, pretrain="7", r1="8", r2="9")
    if squeue:
        for program in ("squeue", "sacct"):
            (tmp_path / "bin" / program).write_text(f"#!/bin/sh\necho {program} {squeue} >&2\nexit 1\n")
            (tmp_path / "bin" / program).chmod(0o755)
    table = status.table(chain)
    words = [line.split()[1] for line in table.splitlines()[2:7]]
    assert words == ["RUNNING?", "FAILED", "QUEUED?", "TODO", "TODO"]
    assert table.splitlines()[7:] == (["squeue is down", "sacct is down"] if squeue else [
        "no squeue here: what Slurm's jobs do is not known"])  # fmt: skip
